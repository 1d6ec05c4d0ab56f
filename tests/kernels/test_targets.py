"""Which GPU's configurations a device gets."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from refllm.errors import InputError  # noqa: E402
from refllm.kernels import targets  # noqa: E402


@pytest.mark.parametrize(
    ("capability", "hip", "name"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 9), None, "sm_80"),
        ((9, 0), None, "sm_90"),
        ((10, 0), None, "sm_100"),
        ((12, 1), None, "sm_100"),
        ((9, 4), "6.2", "gfx942"),
    ],
)
def test_a_gpu_gets_the_configurations_of_the_nearest_older_one(
    capability: tuple[int, int], hip: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    targets._target_of_gpu.cache_clear()
    try:
        for index in (None, 3):
            found = targets.target_of(SimpleNamespace(type="cuda", index=index))
            assert found is targets.target(name)
    finally:
        targets._target_of_gpu.cache_clear()
    assert asked == ([] if hip else [0, 3])
    assert found.is_amd == (hip is not None)
    assert found.warp_size == (64 if hip else 32)


def test_without_a_gpu_there_is_a_default_and_other_names_are_refused() -> None:
    assert targets.target_of(torch.device("cpu")) is targets.DEFAULT is targets.target("sm_90")
    with pytest.raises(InputError, match="target 'sm_70' is not known; use one of sm_80, sm_90, sm_100, gfx942"):
        targets.target("sm_70")
    assert [name for name, target in targets.TARGETS.items() if name != target.name] == []
