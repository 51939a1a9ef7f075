"""The model card that is saved beside a model."""

import pytest
from huggingface_hub import ModelCard

from quietstar.models.card import write_card


def test_what_it_says(make_model, tmp_path):
    model = make_model(base_model_name_or_path="some/base", thought_length=3, think=2.5)
    model.generation_config.draft_length = "auto"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "some/base"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "quietstar" in data["tags"]
    for line in (
        "# Quiet-STaR of base",
        "| tokens in a thought | 3 |",
        "| when it thinks, unless told otherwise | where the base prediction has more than 2.5 nats of entropy |",
        "| tokens drafted at once, unless told otherwise | auto |",
        "| base model | `some/base` |",
    ):
        assert line in card.text.splitlines()
    for heading in ("How to use it", "How it thinks", "Limits"):
        assert f"\n## {heading}\n" in card.text
    assert "## Training" not in card.text
    assert "{" not in card.text


def test_a_local_base_is_named_but_no_link(make_model, tmp_path):
    make_model(base_model_name_or_path=str(tmp_path)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert f"`{tmp_path}`" in card.text


def test_it_follows_the_model_until_somebody_changes_it(make_model, tmp_path):
    path = tmp_path / "README.md"
    make_model(thought_length=3).save_pretrained(tmp_path)
    make_model(thought_length=5).save_pretrained(tmp_path)
    assert "| tokens in a thought | 5 |" in path.read_text()
    changed = path.read_text().replace("## Limits", "## My own limits")
    path.write_text(changed)
    make_model(thought_length=7).save_pretrained(tmp_path)
    assert path.read_text() == changed


@pytest.mark.parametrize("content", [b"# Mine\n", b"", "# Меіn\n".encode("cp1251"), b"<!-- comment -->\n"])
def test_a_card_of_the_users_is_left_alone(make_model, tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    make_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


def test_only_the_process_that_saves_writes_it(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_more_may_be_said(make_model, tmp_path):
    assert write_card(tmp_path, make_model(), {"steps": 7}, license="mit", tags="mine", model_name="Thinker")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags[0] == "quietstar"
    assert card.data.tags[-1] == "mine"
    assert "\n# Thinker\n" in card.text
    assert "\n## Training\n" in card.text
    assert "| steps | 7 |" in card.text
