"""The same weights in the libraries that decoding is compared with: `transformers` and CTranslate2."""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from lmtutorial.hugging_face import to_hf
from lmtutorial.models.transformer import Transformer


def version(name: str) -> str:
    """The name of a library, with its version."""
    return f"{name} {importlib.metadata.version(name)}"


def as_transformers(model: Transformer) -> Any:
    """A GPT-2 of `transformers`, without an end of text, so that all texts are equally long."""
    config, tensors = to_hf(model)
    peer = AutoModelForCausalLM.from_config(GPT2Config(**config))
    peer.load_state_dict(tensors, strict=False)
    peer.tie_weights()
    peer.generation_config.eos_token_id = None
    return peer.eval()


def transformers_texts(peer: Any, prompts: list[list[int]], new: int, beams: int = 1) -> list[list[int]]:
    """`generate` on prompts of one length."""
    with torch.inference_mode():
        ids = torch.tensor(prompts)
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, num_beams=beams, pad_token_id=0,
        )  # fmt: skip
    return [row[ids.shape[1] :] for row in out.tolist()]


class CTranslate2:
    """A GPT-2 of CTranslate2, its tokens called by their numbers."""

    def __init__(self, peer: Any, compute_type: str, threads: int) -> None:
        """From the model of `as_transformers`; `compute_type` is float32 or int8."""
        import ctranslate2
        from ctranslate2.converters.transformers import GPT2Loader

        peer = copy.deepcopy(peer)  # its weights are rounded in place
        loader = GPT2Loader()
        spec = loader.get_model_spec(peer)
        spec.register_vocabulary([*map(str, range(peer.config.vocab_size - 1)), "<|endoftext|>"])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "<|endoftext|>"
        spec.validate()
        spec.optimize(quantization=compute_type)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self.generator = ctranslate2.Generator(
                folder, compute_type=compute_type, intra_threads=threads, inter_threads=1
            )

    def texts(self, prompts: list[list[int]], new: int, beams: int = 1) -> list[list[int]]:
        """Greedy, or with beams, `new` tokens each."""
        results = self.generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=new, min_length=new, beam_size=beams, sampling_topk=1, include_prompt_in_result=False,
        )  # fmt: skip
        return [list(result.sequences_ids[0]) for result in results]
