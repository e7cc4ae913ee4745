"""Every causal architecture of transformers at a tiny width."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relora_ray.errors import ConfigError
from tests.architectures import NOT_RECOMPUTED, NOT_TRAINED, NOT_TRIED, examine, names, row

DOCS = Path(__file__).parent.parent / "docs/architectures.md"


@pytest.mark.parametrize("model_type", sorted(set(names()) - NOT_TRAINED.keys()))
def test_architecture_is_trained_merged_and_exported(model_type: str, tmp_path: Path) -> None:
    found = examine(model_type, tmp_path)
    assert (found.wrapping, found.merging) == (0.0, 0.0)
    assert found.exporting < 1e-6
    assert found.recompute == (model_type not in NOT_RECOMPUTED)
    assert all(after < before for before, after in itertools.pairwise(found.losses)), found.losses
    assert row(model_type, found) in DOCS.read_text().splitlines()


@pytest.mark.parametrize("model_type", NOT_TRAINED)
def test_architecture_that_is_not_causal_or_has_another_loss_is_refused(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not causal|adds something to the cross-entropy"):
        examine(model_type, tmp_path)


def test_none_is_forgotten() -> None:
    assert NOT_TRIED.keys() | NOT_TRAINED.keys() <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(names()) > 150
