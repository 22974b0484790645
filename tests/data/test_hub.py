import json
import sys
from itertools import islice
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest

from evopress.data.hub import articles, c4, fineweb_edu, wikitext2
from evopress.data.sources import SPLITS
from evopress.errors import EvoPressError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WIKI_ROWS = ["", " = One = \n", "", " Text one . \n", " = = Section = = \n", " More . \n"]
WIKI_ROWS += ["", " = Two = \n", "", " Text two . \n", "", " = Three = \n", " Text three . \n"]


@pytest.fixture
def hub(monkeypatch):
    """A hub in memory: `rows` by split, `calls` of load_dataset, `asked` revisions."""
    state = SimpleNamespace(rows={}, calls=[], asked=[], error=None)

    def load_dataset(repository, **settings):
        state.calls.append((repository, settings))
        for text in state.rows[settings["split"]]:
            if text is None:
                raise OSError("connection reset")
            yield {"text": text}

    class Api:
        def dataset_info(self, repository, *, revision, timeout):
            state.asked.append(revision)
            assert timeout > 0
            if state.error:
                raise state.error
            return SimpleNamespace(sha=COMMIT)

    datasets = ModuleType("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return state


def test_articles_are_put_together_from_rows():
    got = list(articles(WIKI_ROWS))
    assert [text.split(" = ")[1] for text in got] == ["One", "Two", "Three"]
    assert "\n\n".join(got) == "\n\n".join(WIKI_ROWS)


def test_wikitext2_divides_train_by_article_and_evaluates_on_all_of_test(hub):
    hub.rows = {"train": WIKI_ROWS, "test": WIKI_ROWS}
    source = wikitext2()
    calibration, search = (list(source.documents(split)) for split in ("calibration", "search"))
    assert calibration == list(articles(WIKI_ROWS))[::2] and search == list(articles(WIKI_ROWS))[1::2]
    assert list(source.documents("evaluation")) == ["\n\n".join(WIKI_ROWS)]


@pytest.mark.parametrize("make", [c4, fineweb_edu])
def test_splits_are_disjoint(hub, make):
    hub.rows = {split: [f"{split} {i}" for i in range(10)] for split in ("train", "validation")}
    source = make()
    documents = [text for split in SPLITS for text in source.documents(split)]
    assert len(set(documents)) == len(documents)
    assert {f"train {i}" for i in range(10)} <= set(documents)


def test_a_document_that_repeats_is_in_one_split_alone(hub):
    hub.rows = {"train": ["a", "b", " a", "c", "b\n", "d", "a"]}
    source = fineweb_edu()
    assert [list(source.documents(split)) for split in SPLITS] == [["a", "d"], ["b"], ["c"]]


def test_stream_is_pinned_and_read_no_further_than_asked(hub):
    hub.rows = {"train": ["one", "two", "three", "four", None]}
    assert list(islice(fineweb_edu().documents("calibration"), 2)) == ["one", "four"]
    (repository, settings), *more = hub.calls
    assert not more and repository == "HuggingFaceFW/fineweb-edu"
    assert settings["streaming"] is True and settings["name"] == "sample-10BT"
    assert settings["revision"] == fineweb_edu().identity()["revision"] and len(settings["revision"]) == 40


def test_branch_is_resolved_to_a_commit_and_recorded(hub):
    hub.rows = {"train": ["one"]}
    source = c4(revision="main")
    assert source.identity()["revision"] == COMMIT
    list(source.documents("calibration"))
    assert hub.calls[0][1]["revision"] == COMMIT
    json.dumps(source.identity())


def test_identity_of_a_commit_needs_no_hub(hub):
    hub.error = OSError("no network")
    assert c4(revision=COMMIT).identity()["revision"] == COMMIT
    assert hub.asked == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_is_one_sentence_with_the_way_out(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(EvoPressError, match=f"{variable} is set.*data=python_docs.*data=text"):
        next(wikitext2().documents("search"))
    assert hub.asked == [] and hub.calls == []


def test_no_network_is_one_sentence_before_the_stream_is_tried(hub):
    hub.error = OSError("Name or service not known\nand a second line")
    with pytest.raises(EvoPressError, match=r"data=python_docs.*data=text") as caught:
        next(c4().documents("search"))
    assert "Name or service not known" in str(caught.value) and "\n" not in str(caught.value)
    assert hub.calls == []


def test_stream_that_breaks_off_is_explained(hub):
    hub.rows = {"train": ["one", None]}
    with pytest.raises(EvoPressError, match="connection reset"):
        list(c4().documents("calibration"))


def test_unknown_revision_is_explained(hub):
    kind = huggingface_hub.errors.RevisionNotFoundError
    hub.error = kind.__new__(kind)  # made without the HTTP response that its constructor asks for
    with pytest.raises(EvoPressError, match="no revision 'v9' of allenai/c4"):
        c4(revision="v9").identity()


def test_missing_package_is_explained(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvoPressError, match="pip install datasets"):
        next(c4().documents("search"))


@pytest.mark.network
@pytest.mark.parametrize("make", [wikitext2, c4, fineweb_edu])
def test_real_hub_gives_text(make):
    pytest.importorskip("datasets")
    source = make()
    for split in SPLITS:
        assert len(next(source.documents(split))) > 100
