"""Trains the checkpoints that have learnt corpus.txt: `python -m refllm.golden.train_checkpoints [NAME ...]`.

One of every family, shaped as the published ones are, from fresh weights by `refllm train`'s own loop on Torch. Another
processor adds in another order, so a second run gives the same losses and not the same bytes: the command says how far
the loss of the whole corpus is from the one that is stored, and fails where that is more than a tenth.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from refllm.config import ArceeConfig, HeliumConfig, LlamaConfig, ModelConfig, StableLmConfig
from refllm.generation.config import GenerationConfig
from refllm.inputs import to_numpy
from refllm.models import families
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.text.tokenizer import Tokenizer
from refllm.training.run import Settings, TrainingRun

from . import FOLDER, corpus, train_tokenizers

DTYPE = "bfloat16"
CONTEXT = 128
"""Tokens of a window."""
SEED = 1768842596
"""The seed of the fresh weights."""
AS_BEFORE = 0.1
"""How far, as a share, the loss of the corpus may be from that of the stored checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """What one checkpoint is trained from.

    tokens: length of the tokenizer; the model's vocab_size may be larger. phases: (steps, learning rate), one after the
    other; the last takes small steps, so that what is left does not hang on the last few windows.
    """

    config: ModelConfig
    tokenizer: Callable[[int], Tokenizer]
    tokens: int
    phases: tuple[tuple[int, float], ...] = ((1600, 2e-3), (400, 2e-4))


def recipes() -> dict[str, Recipe]:
    """Name of the checkpoint folder -> recipe. None has a bias that the published models of its family have not."""
    return {
        # As Helium-1-preview-2b: as many key heads as query heads, untied.
        "helium-trained": Recipe(
            HeliumConfig(
                vocab_size=768,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=6,
                head_dim=16,
                rms_norm_eps=1e-8,
                max_position_embeddings=512,
                rope_theta=100000.0,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=3,
            ),
            train_tokenizers.pieces_with_byte_fallback,
            tokens=768,
        ),
        # As Llama 3.2: four query heads per key head, tied, llama3 RoPE.
        "llama-trained": Recipe(
            LlamaConfig(
                vocab_size=640,
                hidden_size=128,
                intermediate_size=288,
                num_hidden_layers=3,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=16,
                rms_norm_eps=1e-5,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                bos_token_id=635,
                eos_token_id=[636, 639],
                pad_token_id=None,
            ),
            train_tokenizers.bytes_with_bos,
            tokens=640,
        ),
        # As StableLM-2-1.6B: biases on q, k and v, a quarter of the dims rotated.
        "stablelm-trained": Recipe(
            StableLmConfig(
                vocab_size=640,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=3,
                num_key_value_heads=3,
                max_position_embeddings=512,
                partial_rotary_factor=0.25,
                use_qkv_bias=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            ),
            _plain_with_padding,
            tokens=620,
        ),
        # As AFM-4.5B: yarn with factor 20, squared ReLU without a gate, grouped heads.
        "arcee-trained": Recipe(
            ArceeConfig(
                vocab_size=640,
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=640,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 20.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "original_max_position_embeddings": 32,
                },
                bos_token_id=635,
                eos_token_id=638,
                pad_token_id=639,
            ),
            train_tokenizers.bytes_with_named_templates,
            tokens=640,
        ),
    }


def _plain_with_padding(vocab_size: int) -> Tokenizer:
    """The tokenizer of StableLM-2 in its make: <|endoftext|> pads too."""
    tokenizer = train_tokenizers.bytes_plain(vocab_size)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train(name: str, recipe: Recipe, folder: Path, log: Callable[[str], None] = lambda text: None) -> None:
    """Trains one checkpoint into `folder`, on one thread: products this small wait for a second one."""
    from refllm.kernels.models.fast_model import fast_class

    config, tokenizer = recipe.config, recipe.tokenizer(recipe.tokens)
    cls = families.find(config.model_type, "causal_lm")
    assert cls is not None
    model = fast_class(cls).fresh(config, seed=SEED, backend="torch", device="cpu")
    ids = documents(tokenizer)
    for number, (steps, lr) in enumerate(recipe.phases):
        settings = Settings(batch=4, context=CONTEXT, lr=lr, weight_decay=0.1, seed=number)
        with tempfile.TemporaryDirectory() as kept, _one_thread():
            for done, _ in (run := TrainingRun(model, ids, Path(kept), settings)).steps(steps, save_every=steps):
                if done % 100 == 0:
                    log(f"{name}: {done} of {steps} steps at {lr:g}, loss {np.mean(run.losses[-50:]):.3f}")
    config.architectures, config.dtype = [cls.__name__], DTYPE
    write(config, {key: to_numpy(tensor) for key, tensor in model.named_parameters()}, tokenizer, folder)


def write(config: ModelConfig, tensors: Mapping[str, np.ndarray], tokenizer: Tokenizer, folder: Path) -> None:
    """The checkpoint as it is stored."""
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "generation_config.json": GenerationConfig(**special).to_json_string(),
        "config.json": config.to_json_string(),
    }
    save_checkpoint(folder, tensors, DTYPE, texts=texts)
    tokenizer.save_pretrained(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def documents(tokenizer: Tokenizer) -> np.ndarray:
    """The corpus as it is learnt: BOS, a paragraph, EOS, and the next one, so that a model can begin and end."""
    paragraphs = corpus().split("\n\n")
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    begin = [] if begin == end else begin
    parts = [begin + tokenizer.encode(text, add_special_tokens=False) + end for text in paragraphs]
    return np.array([*([] if begin else end), *chain(*parts)])


def corpus_loss(folder: Path) -> float:
    """What a checkpoint has learnt: the loss of the corpus in windows of CONTEXT tokens, in nats per token."""
    import refllm

    ids = documents(refllm.AutoTokenizer.from_pretrained(folder))
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return float(refllm.load(folder, head="causal_lm")(windows, labels=windows, use_cache=False).loss)


def main() -> int:
    """Trains all checkpoints, or those named, into the package's own folder unless told otherwise."""
    parser = argparse.ArgumentParser(description="Train the embedded checkpoints that have learnt the corpus again.")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(recipes())}; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER / "checkpoints")
    arguments = parser.parse_args()
    far = []
    for name in arguments.names or recipes():
        if name not in recipes():
            parser.error(f"{name!r} is none of them; there are {', '.join(recipes())}")
        stored = FOLDER / "checkpoints" / name
        before = corpus_loss(stored) if stored.exists() else None
        train(name, recipes()[name], arguments.folder / name, lambda text: print(text, flush=True))
        after = corpus_loss(arguments.folder / name)
        print(f"{name}: loss {after:.4f}" + (f"; the one that is stored has {before:.4f}" if before else ""))
        if before and abs(after / before - 1) > AS_BEFORE:
            far.append(name)
    if far:
        print(f"farther than {AS_BEFORE:.0%} from what is stored: {', '.join(far)}")
    return 1 if far else 0


if __name__ == "__main__":
    raise SystemExit(main())
