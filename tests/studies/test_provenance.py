"""The commit that a result states is that of the code which made it."""

import subprocess

import pytest

from studies import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one file of code and one result, from which the function reads."""
    for name in ("studies/grid.py", "studies/results/mnist/methods.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    identity = ["-c", "user.name=name", "-c", "user.email=address"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "studies" / "provenance.py"))
    monkeypatch.delenv("PDP_COMMIT", raising=False)
    return tmp_path


def test_commit_of_a_clean_checkout(checkout):
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert head.startswith(provenance.checkout_commit())
    assert len(provenance.checkout_commit()) == 12


def test_changed_code_makes_a_checkout_dirty_and_new_results_do_not(checkout):
    (checkout / "studies/results/mnist/methods.csv").write_text("second\n")
    assert not provenance.checkout_commit().endswith("+dirty")
    (checkout / "studies/grid.py").write_text("second\n")
    assert provenance.checkout_commit().endswith("+dirty")


def test_commit_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PDP_COMMIT", "c0ffee")
    assert provenance.checkout_commit() == "c0ffee"
    monkeypatch.delenv("PDP_COMMIT")
    monkeypatch.setenv("PATH", str(checkout))  # holds no git
    assert provenance.checkout_commit() == "unknown"
