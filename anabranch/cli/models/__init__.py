"""Obtaining, converting and describing models: what `anabranch model` does.

`catalogue` names the models that can be fetched by name, `store` keeps them, `fetch` gets one, `convert` and
`tokenizer_files` turn its GGUF file into a Hugging Face folder. `remote` names models by where they lie,
`remote_fetch` gets their files over `web`. `describe` says what a folder holds.
"""
