"""`anabranch model`: fetch, list and inspect models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli.models.catalogue import CATALOGUE, DEFAULT_MODEL
from anabranch.cli.models.describe import ModelDescription, describe
from anabranch.cli.models.progress import ConsoleProgress, FetchProgress
from anabranch.cli.models.remote import remote_model
from anabranch.cli.models.store import ModelStore, StoredModel, cache_folder
from cluster.errors import ModelError

app = typer.Typer(help="Fetch, list and inspect models.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of a table.")]


@app.command("fetch")
def fetch_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A name that `anabranch model list` shows, a hub's OWNER/NAME@COMMIT, or the https:// URL "
            "of a folder that holds a model and its SHA256SUMS."
        ),
    ] = DEFAULT_MODEL,
    name: Annotated[
        str | None,
        typer.Option(help="What to call it here; default: the last part of the source."),
    ] = None,
) -> None:
    """Download a model, check every file's hash, and print its folder; one that is here already is only
    checked.

    An attempt that was interrupted goes on where it was. HF_ENDPOINT names another hub than Hugging Face's,
    and HF_TOKEN holds its token; ANABRANCH_MODEL_AUTHORIZATION is sent as the Authorization of a URL.
    SHA256SUMS is what `sha256sum * > SHA256SUMS` writes.
    """
    with ConsoleProgress(Console(stderr=True)) as progress:
        folder = fetch(source, progress, name)
    print(folder)


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """Show the models that can be fetched, and which are here."""
    models = default_store().list_models()
    if as_json:
        print(json.dumps([_as_json(model) for model in models], indent=2))
    else:
        Console().print(_list_table(models))


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="A fetched model's name, or a Hugging Face folder.")],
    as_json: AsJson = False,
) -> None:
    """Show what a model is and what a token of its cache costs."""
    description = describe(resolve(model))
    if as_json:
        print(json.dumps(dataclasses.asdict(description), indent=2))
    else:
        Console().print(_description_table(description))


def default_store() -> ModelStore:
    """The store in the user's cache folder."""
    return ModelStore(cache_folder())


def fetch(source: str, progress: FetchProgress, name: str | None = None) -> Path:
    """`ModelStore.fetch` or `fetch_remote` in the user's cache folder, whichever the source asks for."""
    if source in CATALOGUE:
        if name not in (None, source):
            raise ModelError(f"{source} is always called so: leave out --name")
        return default_store().fetch(source, progress)
    remote = remote_model(source)
    return default_store().fetch_remote(remote, name or remote.name, progress)


def resolve(name_or_path: str) -> Path:
    """`ModelStore.resolve` in the user's cache folder."""
    return default_store().resolve(name_or_path)


def _as_json(model: StoredModel) -> dict[str, object]:
    return dataclasses.asdict(model) | {"state": model.state.value, "folder": str(model.folder)}


def _list_table(models: list[StoredModel]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in ("name", "state", "download", "on disk", "licence"):
        table.add_column(column, no_wrap=True)
    table.add_column("description")
    for model in models:
        download = "" if model.download_bytes is None else f"{model.download_bytes / 1e6:.0f} MB"
        on_disk = f"{model.folder_bytes / 1e6:.0f} MB"
        licence = model.licence or "not stated"
        table.add_row(model.name, model.state.value, download, on_disk, licence, model.description)
    return table


def _description_table(description: ModelDescription) -> Table:
    table = Table(show_header=False, title=description.folder)
    window = description.sliding_window
    rows = {
        "architecture": description.architecture,
        "parameters": f"{description.parameters:,}",
        "layers": f"{description.layers}",
        "heads": f"{description.query_heads} query, {description.kv_heads} key/value,"
        f" of size {description.head_size}",
        "hidden size": f"{description.hidden_size}",
        "vocabulary": f"{description.vocabulary_size:,}" + (" (tied)" if description.tied_embeddings else ""),
        "context length": f"{description.context_length:,}" + (f", window {window:,}" if window else ""),
        "rope": description.rope,
        "weights": f"{description.weight_bytes:,} bytes ({description.stored_dtype})",
        "KV per token": f"{description.kv_bytes_per_token_float32:,} bytes in float32,"
        f" {description.kv_bytes_per_token_bfloat16:,} in bfloat16",
        "tokenizer": description.tokenizer,
        "chat template": "yes" if description.has_chat_template else "no",
        "licence": description.licence or "not stated",
        "files": "\n".join(f"{name}  {size:,}" for name, size in description.files.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
