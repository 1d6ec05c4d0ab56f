"""Logits of tiny models with weights from a formula, known to nine digits.

Each model has 2 layers, hidden_size 16, 4 query heads, intermediate_size 20 and 12 tokens. Tensor number t (of the
causal-LM tensor names, sorted, from 0) has at flat index n the value 0.2 sin(1 + 0.7 t + 0.37 n), and 1 more if it is
the weight of a norm. The numbers were computed once by an implementation that shares no code with this one, in float64;
those of Llama by Transformers in float64, whose norms, rotary tables and softmax are float32 even then.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from refllm.config import CONFIG_CLASSES
from refllm.strategies.small_models import build, model_class

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
LABELS = np.array([[3, 1, -100, 1, 5, 9, 2, 6]])


@dataclass(frozen=True)
class Known:
    """The first six logits of the last token, of the token at position 3, and of the last token under MASK; the sum of
    all 96 logits and of their squares, and the loss for LABELS."""

    family: str
    name: str
    config: dict[str, Any]
    tensors: int
    last: tuple[float, ...]
    position_3: tuple[float, ...]
    masked_last: tuple[float, ...]
    total: float
    squares: float
    loss: float

    @property
    def digits(self) -> float:
        return 1e-6 if self.family == "llama" else 6e-10


CASES = [
    Known(
        "helium",
        "plain",
        {"head_dim": 4},
        tensors=21,
        last=(-0.653658365, -0.117765567, 0.433490933, 0.928194184, 1.301805178, 1.505582606),
        position_3=(1.593129232, 1.566199517, 1.334943337, 0.929530386, 0.402850856, -0.176384615),
        masked_last=(-0.944841963, -0.422121522, 0.155668913, 0.713150774, 1.177594951, 1.488410034),
        total=15.879058955,
        squares=99.596772884,
        loss=2.722512223,
    ),
    Known(
        "helium",
        "biases_and_one_kv_head",
        {"head_dim": 4, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        tensors=33,
        last=(-0.675678033, -0.092195892, 0.503314129, 1.033161765, 1.428223068, 1.636958321),
        position_3=(1.114467121, 1.195480880, 1.120532146, 0.899398735, 0.560929722, 0.149281791),
        masked_last=(-0.386804332, 0.153577337, 0.673923299, 1.106349196, 1.394440723, 1.500613447),
        total=18.862865853,
        squares=74.959837587,
        loss=2.926184740,
    ),
    Known(
        "llama",
        "plain",
        {"rms_norm_eps": 1e-05},
        tensors=21,
        last=(-0.638927361, -0.133718984, 0.388934378, 0.860847342, 1.220454121, 1.420840397),
        position_3=(1.548813393, 1.551113234, 1.351054768, 0.974737632, 0.471256178, -0.093705379),
        masked_last=(-0.881903575, -0.375643553, 0.179622945, 0.711455826, 1.150472145, 1.439397813),
        total=15.849365508,
        squares=97.916622107,
        loss=2.694211721,
    ),
    Known(
        "llama",
        "biases_and_head_dim_8",
        {"rms_norm_eps": 1e-05, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
        tensors=35,
        last=(-0.262845201, -0.353473243, -0.397987149, -0.390579632, -0.332217078, -0.230513468),
        position_3=(0.562122932, 0.305350872, 0.008742723, -0.289006002, -0.549050991, -0.737466761),
        masked_last=(-0.296349806, -0.383068879, -0.419812767, -0.401787861, -0.331345692, -0.217676148),
        total=-17.528898189,
        squares=18.558331028,
        loss=2.521430492,
    ),
    Known(
        "stablelm",
        "sequential",
        {"partial_rotary_factor": 0.5},
        tensors=26,
        last=(-1.101016585, -1.662346166, -2.006805986, -2.089457802, -1.899518852, -1.461768582),
        position_3=(-2.038136845, -2.113868862, -1.913825446, -1.464104271, -0.823375982, -0.075230024),
        masked_last=(-0.833424098, -1.448393701, -1.874405791, -2.055882813, -1.969149264, -1.625520408),
        total=-7.240512612,
        squares=226.656448785,
        loss=3.709244263,
    ),
    Known(
        "stablelm",
        "parallel_with_per_head_norms",
        {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
        tensors=40,
        last=(-1.052614425, -0.995042013, -0.807656372, -0.514903842, -0.154976932, 0.225168275),
        position_3=(-0.338672769, -0.266182683, -0.158966391, -0.031011336, 0.100989460, 0.219815165),
        masked_last=(-1.223349984, -1.328709163, -1.260724881, -1.028266371, -0.661660181, -0.208733771),
        total=11.372068846,
        squares=34.905213318,
        loss=2.940940748,
    ),
    Known(
        "arcee",
        "plain",
        {},
        tensors=19,
        last=(0.777294922, 0.628050665, 0.396870888, 0.113915315, -0.183901654, -0.457726805),
        position_3=(0.330907658, -0.108441937, -0.533644192, -0.889227200, -1.128801585, -1.221112460),
        masked_last=(0.656900376, 0.559008656, 0.388188641, 0.166725516, -0.076488627, -0.309724060),
        total=-30.808237606,
        squares=50.331917168,
        loss=2.787026670,
    ),
    Known(
        "arcee",
        "biases_and_head_dim_8",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
        tensors=31,
        last=(0.178559554, 0.148160746, 0.098432881, 0.035863457, -0.031384715, -0.094538436),
        position_3=(0.337721065, 0.393381355, 0.397721095, 0.350174121, 0.256943415, 0.130191858),
        masked_last=(0.183192106, 0.156948157, 0.110228744, 0.049128884, -0.018380333, -0.083491650),
        total=-2.748953354,
        squares=3.988244478,
        loss=2.436343862,
    ),
    Known(
        "arcee",
        "yarn",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 20.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
            },
        },
        tensors=19,
        last=(0.222929810, 0.193860632, 0.139500387, 0.066940915, -0.014351672, -0.093771939),
        position_3=(-0.087179789, -0.073614993, -0.050446382, -0.020696533, 0.011753386, 0.042669959),
        masked_last=(0.233228886, 0.201694724, 0.143847459, 0.067233847, -0.018151096, -0.101168046),
        total=-0.893891307,
        squares=1.893193074,
        loss=2.434487224,
    ),
]


def by_formula(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Page name -> tensor; the numbering follows the names in files, where the backbone is "model."."""
    in_file = {name if name.startswith("lm_head") else f"model.{name}": name for name in shapes}
    tensors = {}
    for t, file_name in enumerate(sorted(in_file)):
        name = in_file[file_name]
        n = np.arange(np.prod(shapes[name])).reshape(shapes[name])
        is_norm_weight = "norm" in name and name.endswith(".weight")
        tensors[name] = 0.2 * np.sin(1 + 0.7 * t + 0.37 * n) + is_norm_weight
    return tensors


@pytest.mark.filterwarnings("ignore:.*factor=20.0 is used")
@pytest.mark.parametrize("known", CASES, ids=lambda known: f"{known.family}-{known.name}")
def test_known_logits_and_loss(known: Known) -> None:
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_CLASSES[known.family](**(sizes | tokens | known.config))
    cls = model_class(known.family)
    assert len(cls.tensors(config)) == known.tensors
    model = build(cls, config, by_formula(cls.tensors(config)))

    out = model(IDS, labels=LABELS)
    masked = model(IDS, attention_mask=MASK)

    def agrees(ours: np.ndarray, expected: Any, size: float = 1.0) -> None:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=known.digits * size)

    assert out.logits.shape == (1, 8, 12)
    agrees(out.logits[0, -1, :6], known.last)
    agrees(out.logits[0, 3, :6], known.position_3)
    agrees(masked.logits[0, -1, :6], known.masked_last)
    agrees(out.logits.sum(), known.total, size=1 if known.family != "llama" else 10)
    agrees((out.logits**2).sum(), known.squares, size=1 if known.family != "llama" else 10)
    agrees(out.loss, known.loss)
