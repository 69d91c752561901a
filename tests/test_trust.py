"""A run folder is code: what somebody else could have written is not obeyed."""

import os
import sys

import pytest

from smalto import resume, trust
from smalto.errors import PathInUse
from smalto.trust import check_own


def test_own_folders_are_obeyed(tmp_path):
    (tmp_path / "config.yaml").touch(0o664)
    check_own(tmp_path, "config.yaml", "sweep.json")


@pytest.mark.parametrize("name", ["", "config.yaml", "sweep.json"])
def test_what_everybody_may_write_is_not(tmp_path, name):
    path = tmp_path / name
    if name:
        path.touch()
    path.chmod(0o777)
    with pytest.raises(PathInUse, match=r"written by everybody.*run folder is code"):
        check_own(tmp_path, "config.yaml", "sweep.json")


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file away")
@pytest.mark.parametrize("name", ["", "config.yaml", "sweep.json"])
def test_what_belongs_to_somebody_else_is_not_even_for_root(tmp_path, name):
    path = tmp_path / name
    if name:
        path.touch()
    os.chown(path, 12345, -1)
    with pytest.raises(PathInUse, match=r"belongs to another user \(number 12345\)"):
        check_own(tmp_path, "config.yaml", "sweep.json")


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file away")
def test_files_of_a_file_system_that_gives_everything_to_one_user_are_own(tmp_path, monkeypatch):
    """NFS with root_squash: what root made there belongs to nobody, and could never be continued."""
    for path in (tmp_path / "config.yaml", tmp_path):
        path.touch()
        os.chown(path, 65534, -1)
    with pytest.raises(PathInUse):
        check_own(tmp_path, "config.yaml")
    assert os.listdir(tmp_path) == ["config.yaml"]
    monkeypatch.setattr(trust, "_owner_of_new_files", lambda folder: 65534)
    check_own(tmp_path, "config.yaml")


def test_a_planted_link_counts_as_what_it_leads_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    elsewhere.chmod(0o666)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").symlink_to(elsewhere)
    with pytest.raises(PathInUse):
        check_own(run, "config.yaml")


def test_resume_looks_before_it_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("a: ${oc.create:{_target_: os.mkdir, path: ran}}\n")
    (tmp_path / "config.yaml").chmod(0o666)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smalto resume", str(tmp_path)])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit):
        resume.main()
    assert "a run folder is code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
