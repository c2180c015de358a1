"""Load that outlives the process."""

from pathlib import Path

import numpy as np
import pytest

from omni_common.errors import Internal
from omni_placement.load import LoadBook, LoadRules, Phase, Smoothing, Window
from omni_placement.load.profiles import ProfileFiles

RULES = LoadRules(smoothing=Smoothing(interval_s=60, horizon_s=600))
HOUR_S = 3600.0


def filled(name: str = "org/m") -> LoadBook:
    book = LoadBook(RULES)
    for minute in range(60):
        for phase, tokens in ((Phase.PREFILL, [[90, 10]]), (Phase.DECODE, [[30, 70]])):
            book.add(name, "g/1", Window("w", minute, minute, np.array(tokens), phase, "chat"), at_s=60 * minute + 1)
    return book


def save(book: LoadBook, directory: Path, name: str = "org/m") -> None:
    profile = book.profile(name, "g/1", HOUR_S)
    assert profile is not None
    ProfileFiles(directory).save(profile)


def test_restarted_book_forecasts_what_the_old_one_did(tmp_path: Path) -> None:
    save(filled(), tmp_path)
    book = LoadBook(RULES)
    for profile in ProfileFiles(tmp_path).load():
        book.restore(profile, HOUR_S)
    for phase in (None, Phase.PREFILL, Phase.DECODE):
        before, after = (b.forecast("org/m", "g/1", 600, HOUR_S, phase) for b in (filled(), book))
        assert before is not None and after is not None
        np.testing.assert_allclose(after.load, before.load, rtol=1e-6)
    assert book.total("org/m", "g/1") is None and book.streams("org/m", "g/1", HOUR_S) == []


def test_after_a_long_stop_what_is_reported_soon_outweighs_the_profile(tmp_path: Path) -> None:
    save(filled(), tmp_path)
    book = LoadBook(RULES)
    book.restore(*ProfileFiles(tmp_path).load(), 3 * HOUR_S)
    for minute in range(2):
        fresh = Window("w", minute, minute, np.array([[0, 100]]), Phase.DECODE, "chat")
        book.add("org/m", "g/1", fresh, at_s=3 * HOUR_S + 60 * minute + 1)
    forecast = book.forecast("org/m", "g/1", 600, 3 * HOUR_S + 120, Phase.DECODE)
    assert forecast is not None and forecast.shares[0, 1] > 0.99


def test_a_group_with_reports_keeps_them(tmp_path: Path) -> None:
    save(filled(), tmp_path)
    book = LoadBook(RULES)
    book.add("org/m", "g/1", Window("w", 1, 1, np.array([[5, 0]])), at_s=HOUR_S)
    book.restore(*ProfileFiles(tmp_path).load(), HOUR_S)
    total = book.total("org/m", "g/1")
    assert total is not None and total.tolist() == [[5, 0]]


def test_saving_replaces_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    for _ in range(2):
        save(filled(), tmp_path)
    save(filled("other"), tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "torn.draft").write_bytes(b"half a file")
    assert {profile.model for profile in ProfileFiles(tmp_path).load()} == {"org/m", "other"}


def test_what_was_saved_of_forgotten_groups_is_deleted(tmp_path: Path) -> None:
    ProfileFiles(tmp_path / "none yet").keep([])
    for name in ("org/m", "other"):
        save(filled(name), tmp_path, name)
    ProfileFiles(tmp_path).keep([("other", "g/1")])
    assert [profile.model for profile in ProfileFiles(tmp_path).load()] == ["other"]


@pytest.mark.parametrize("damage", ["cut", "text", "format", "negative"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    save(filled(), tmp_path)
    [path] = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "text":
        path.write_text("no archive")
    else:
        with np.load(path) as saved:
            arrays = dict(saved)
        if damage == "format":
            arrays["head"] = np.array(str(arrays["head"]).replace('"format": 1', '"format": 9'))
        else:
            arrays["shares_0"] = -arrays["shares_0"]
        np.savez(path, **arrays)
    with pytest.raises(Internal, match=path.name):
        ProfileFiles(tmp_path).load()


def test_nothing_is_saved_before_anything_is_known() -> None:
    assert LoadBook(RULES).profile("m", "g", 0) is None
