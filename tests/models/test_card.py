"""The model card that is saved beside a model."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

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


@pytest.mark.parametrize("name", ["/somewhere/a/base", "looks/like-a-name"])
def test_a_local_base_is_named_but_no_link(make_model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "looks" / "like-a-name").mkdir(parents=True)
    make_model(base_model_name_or_path=name).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert f"`{name}`" in card.text


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


@pytest.fixture
def hub(monkeypatch):
    """What is uploaded to a hub that has the cards in ``cards``: file -> content."""
    uploaded, cards = {}, {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **_):
            for operation in operations:
                with operation.as_file() as file:
                    uploaded[operation.path_in_repo] = file.read()

    def load(repo_id, **_):
        if repo_id not in cards:
            raise EntryNotFoundError("no card")
        return ModelCard(cards[repo_id])

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load)
    return SimpleNamespace(uploaded=uploaded, cards=cards)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_it_goes_to_the_hub_unless_there_is_one(make_model, tmp_path, hub, way):
    def push():
        if way == "push_to_hub":
            make_model().push_to_hub("me/thinker", tags=["mine"])
        else:
            make_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/thinker")

    push()
    assert {"config.json", "modeling_quietstar.py", "README.md"} <= hub.uploaded.keys()
    assert b"\n## How it thinks\n" in hub.uploaded["README.md"]
    assert (b"- mine\n" in hub.uploaded["README.md"]) == (way == "push_to_hub")
    hub.cards["me/thinker"] = "---\nlicense: mit\n---\n# Mine\n"
    push()
    assert b"\n# Mine\n" in hub.uploaded["README.md"]
    assert b"How it thinks" not in hub.uploaded["README.md"]
