"""What the README states as fact is what the code has."""

from pathlib import Path

import pytest

from hubbeam.modules.errors import REASONS
from hubbeam.modules.presets import preset_names
from hubbeam.modules.spec import load_spec, spec_names
from hubbeam.transforms.write import PICTURE_FIELDS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_documented(reason: str) -> None:
    assert f"| `{reason}` |" in README


@pytest.mark.parametrize("name", spec_names())
def test_every_module_is_documented(name: str) -> None:
    spec = load_spec(name)
    assert f"| `{name}` | {spec.image_size} | {spec.width} |" in README


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_documented(name: str) -> None:
    assert f"| `{name}`" in README


def test_every_column_is_documented() -> None:
    assert all(f"`{field.name}`" in README for field in PICTURE_FIELDS)
