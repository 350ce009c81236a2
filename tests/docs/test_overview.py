"""The README's picture is drawn from the committed results alone."""

from docs.plots import overview


def test_overview_is_drawn_from_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "PICTURE", tmp_path / "overview.png")
    overview.main()
    picture = overview.PICTURE.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000  # more than empty axes
