"""Models from and to the formats of Hugging Face: safetensors folders, GGUF files, hub ids, here or in a bucket.

One table serves both directions and is written down nowhere: a tensor's name follows from its path in the declared tree
(`models.declare`). `layers/self_attn/q_proj/kernel` is `model.layers.{i}.self_attn.q_proj.weight`, transposed, one
tensor a layer; an embedding keeps its layout. The files themselves are the matter of `safetensors_file`, `gguf_file`
and (config, tokenizer) `hf_files`; how weights on many devices become a file's tensors, that of `gather`.

Nothing here imports torch, unpickles, runs code from a model folder, or touches the network unless a hub id is given.
"""

from jaxalign.hf.reading import fingerprint, load, reader
from jaxalign.hf.writing import save
from jaxalign.hf_files import (
    TOKENIZER_FILES,
    end_of_turn,
    fit_to_tokenizer,
    load_tokenizer,
    read_config,
    resolve,
    stop_ids,
    tokenizer_identity,
    write_tokenizer,
)
from jaxalign.safetensors_file import DTYPES

__all__ = [
    "DTYPES",
    "TOKENIZER_FILES",
    "end_of_turn",
    "fingerprint",
    "fit_to_tokenizer",
    "load",
    "load_tokenizer",
    "read_config",
    "reader",
    "resolve",
    "save",
    "stop_ids",
    "tokenizer_identity",
    "write_tokenizer",
]
