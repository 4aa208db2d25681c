"""Obtaining, converting and describing models: what `anabranch model` does.

`catalogue` names the models that can be fetched, `store` keeps them, `fetch` gets one, `convert` and
`tokenizer_files` turn its GGUF file into a Hugging Face folder, `describe` says what a folder holds.
"""
