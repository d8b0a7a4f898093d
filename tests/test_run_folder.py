"""A run folder: which checkpoints are resumed from and removed, its lock, and its settings."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any, cast

import pytest

from hf_accel.run_folder import LOCK_PATIENCE, RunFolder, find_damage
from hf_accel.utils.errors import SettingError
from hf_accel.utils.writing import write_json

SHARD = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def checkpoint(output: Path, step: int, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    for name, text in (("model.safetensors", "weights"), (SHARD, "moments")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if sealed:
        RunFolder.seal(folder, {"step": step})
    return folder


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


def test_checkpoint_torn_by_a_kill_is_not_resumed_from(tmp_path):
    assert RunFolder(tmp_path).last_complete_checkpoint() is None
    for step in (5, 10, 100):
        checkpoint(tmp_path, step, sealed=step < 100)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-of-mine" / "run_state.json").write_text("{}")
    assert RunFolder(tmp_path).last_complete_checkpoint() == tmp_path / "checkpoint-10"
    assert "checkpoint-100/run_state.json" in str(find_damage(tmp_path / "checkpoint-100"))


@pytest.mark.parametrize("name", ["model.safetensors", SHARD, "run_state.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damaged_checkpoint_is_not_resumed_and_names_the_file(tmp_path, name, how):
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert find_damage(torn) is None and RunFolder(tmp_path).last_complete_checkpoint() == torn
    if how == "missing":
        (torn / name).unlink()
    else:
        (torn / name).write_bytes((torn / name).read_bytes()[:-3])
    assert str(torn / name) in str(find_damage(torn))
    assert RunFolder(tmp_path).last_complete_checkpoint() == whole


def test_checkpoint_without_sizes_is_resumed_from(tmp_path):
    (checkpoint(tmp_path, 1) / "run_state.json").write_text(json.dumps({"step": 1}))
    assert RunFolder(tmp_path).last_complete_checkpoint() is not None


def test_only_interrupted_checkpoints_make_room(tmp_path):
    # As after a SIGTERM whose checkpoint-13 was not finished in time
    for step in (8, 10, 13):
        checkpoint(tmp_path, step, sealed=step < 13)
    RunFolder(tmp_path).remove_interrupted(20)
    assert names(tmp_path) == {"checkpoint-8", "checkpoint-10"}
    checkpoint(tmp_path, 20, sealed=False)
    assert RunFolder(tmp_path).last_complete_checkpoint() == tmp_path / "checkpoint-10"
    RunFolder.seal(tmp_path / "checkpoint-20", {"step": 20})
    RunFolder(tmp_path).remove_old(2)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-20"}


def test_damaged_checkpoints_do_not_count_towards_the_limit(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-6" / SHARD).unlink()
    (tmp_path / "checkpoint-8" / SHARD).unlink()
    RunFolder(tmp_path).remove_interrupted(6)  # it is written again, from new files only
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-8"}
    checkpoint(tmp_path, 6)
    RunFolder(tmp_path).remove_old(2)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}


# Settings


def test_a_run_of_another_task_is_not_replaced(tmp_path: Path):
    run, rules = RunFolder(tmp_path), {"task": "free", "budget": "fixed"}
    run.recipe.write_text("{task: pretrain, budget: 64}")
    assert run.compare_settings({"task": "pretrain", "budget": 64}, cast(Any, rules)) == []
    with pytest.raises(SettingError, match=r"^output_dir='.*': .*task=pretrain.*choose another output_dir"):
        run.compare_settings({"task": "search", "budget": 64}, cast(Any, rules))


@pytest.mark.parametrize("text", ["", "[1]", "{a: [", '{"units": 1', "\xff"])
def test_a_broken_file_of_a_run_is_named_with_a_remedy(text: str, tmp_path: Path):
    run = RunFolder(tmp_path)
    for path, read in ((run.recipe, run.read_recipe), (run.results, run.read_results)):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(SettingError, match=rf"^{path} cannot be read: [^\n]*Restore it from a copy[^\n]*\Z"):
            read()
    (checkpoint(tmp_path, 1) / "run_state.json").write_bytes(text.encode("latin-1"))
    assert "run_state.json" in str(find_damage(tmp_path / "checkpoint-1"))


def further_is_named(run: RunFolder, now: dict[str, Any], rules: Any) -> bool:
    with pytest.raises(SettingError) as refused:
        run.compare_settings(now, rules)
    assert "budget=65: " in str(refused.value)
    return f"give continue_from={run} and another output_dir" in str(refused.value)


@pytest.mark.parametrize("state", ["begun", "saved", "complete"])
def test_settings_that_may_change_and_when(state: str, tmp_path: Path):
    run = RunFolder(tmp_path)
    rules: Any = {"budget": "fixed", "learning_rate": "correction", "num_workers": "free", "of_later": "fixed"}
    now = {"budget": 64, "learning_rate": 0.1, "num_workers": 2, "of_later": [1]}
    assert run.compare_settings(now, rules) == []  # no run was started
    run.recipe.write_text("{budget: 64, learning_rate: 0.1, num_workers: 2, of_old: 1}")
    if state != "begun":
        checkpoint(tmp_path, 1)
    if state == "complete":
        write_json(run.results, {"units": 1.0})
    assert run.compare_settings(now | {"num_workers": 0}, rules) == []
    remedy = {"begun": "remove this one", "saved": "restore the key", "complete": "another output_dir for a new"}[state]
    with pytest.raises(SettingError, match=rf"^budget=65: .* holds a run with budget=64.*{remedy}"):
        run.compare_settings(now | {"budget": 65}, rules)
    assert further_is_named(run, now | {"budget": 65.0}, rules) == (state == "complete")
    slower = now | {"learning_rate": 0.01}
    told = {"saved": "Continuing with learning_rate=0.01 (until here 0.1)"}
    told["begun"] = "Starting from the beginning with learning_rate=0.01, as no checkpoint was saved with 0.1"
    if state in told:
        assert run.compare_settings(slower, rules) == [told[state]]
    else:
        with pytest.raises(SettingError, match=rf"^learning_rate=0.01: .*{remedy}"):
            run.compare_settings(slower, rules)
    with pytest.raises(KeyError, match="undeclared"):
        run.compare_settings({"undeclared": 1}, rules)


@pytest.mark.parametrize(
    ("where", "restarts"),
    [(".", False), ("kept", False), ("kept start", True), ("torn", True), ("damaged", False), ("search", False)],
)
def test_a_run_restarts_only_where_nothing_that_was_trained_was_saved(where: str, restarts: bool, tmp_path: Path):
    run, rules = RunFolder(tmp_path), cast(Any, {"learning_rate": "correction"})
    run.recipe.write_text(f"{{learning_rate: 9.0, task: {'search' if where == 'search' else 'pretrain'}}}")
    folder = tmp_path / ("kept" if "kept" in where else ".")
    if where != "search":
        saved = checkpoint(folder, 0 if "start" in where else 3, sealed=where != "torn")
        (saved / "model.safetensors").write_text("less" if where == "damaged" else "weights")
    assert run.has_trained() == (not restarts and where != "search")
    try:
        notes = run.compare_settings({"learning_rate": 1.0}, rules)
    except SettingError as error:
        notes = [str(error)]
        assert "restore the key to continue that run" in notes[0]
    assert any(note.startswith("Starting from the beginning with learning_rate=1, as no") for note in notes) == restarts


def test_a_changed_schedule_file_is_named_with_the_change(tmp_path: Path):
    run, rules, files = RunFolder(tmp_path), cast(Any, {"schedule": "fixed"}), {"schedule": "s.yaml"}
    stages = [{"until": 0.5, "patch_size": 8}, {"until": 1.0, "patch_size": 4}]
    assert run.offer_stages() == ""
    run.recipe.write_text(json.dumps({"schedule": stages}))
    assert run.compare_settings({"schedule": stages}, rules, files) == []
    for now, change in (
        ([{"until": 0.75, "patch_size": 8}, stages[1]], "stage 1 had until=0.5 and now has 0.75"),
        (stages[1:], r"they were \[{'until': 0.5, .* and now are \[{'until': 1.0, 'patch_size': 4}\]"),
    ):
        with pytest.raises(SettingError, match=rf"^schedule='s.yaml': {run} .*: {change}, of which no checkpoint"):
            run.compare_settings({"schedule": now}, rules, files)
    checkpoint(tmp_path, 1)
    with pytest.raises(SettingError, match=r"now are \[\]; choose another output_dir, or restore the file to continue"):
        run.compare_settings({"schedule": []}, rules, files)
    run.recipe.write_text("schedule: s.yaml")  # of an earlier version, whose checkpoints tell the stages
    assert run.compare_settings({"schedule": stages}, rules, files) == [] and run.offer_stages() == ""


# The lock


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("hf_accel.run_folder.LOCK_PATIENCE", 0.2)


def fork(act: Callable[[], Any]) -> int:
    """Run `act` in a forked process, which ends without a word to pytest; its id."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(0)
    return child


def test_lock_is_held_until_its_launch_ends(tmp_path: Path, impatient: None, capsys):
    with RunFolder(tmp_path).lock():
        os.waitpid(fork(lambda: None), 0)  # a worker that ends releases nothing
        with pytest.raises(SettingError, match="another launch is at work there"), RunFolder(tmp_path).lock():
            pass
        assert f"Another launch is at work in {tmp_path}: waiting for 0.2 s" in capsys.readouterr().out
    with RunFolder(tmp_path).lock():
        pass


def test_lock_does_not_outlive_a_killed_launch_in_its_workers(tmp_path: Path, impatient: None):
    worker_file = tmp_path / "worker"

    def launch() -> None:
        with RunFolder(tmp_path).lock():
            worker = fork(lambda: time.sleep(60))
            (tmp_path / "part").write_text(str(worker))
            (tmp_path / "part").rename(worker_file)
            time.sleep(60)

    launched = fork(launch)
    while not worker_file.exists():
        time.sleep(0.01)
    try:
        with pytest.raises(SettingError, match="at work"), RunFolder(tmp_path).lock():
            pass
        os.kill(launched, signal.SIGKILL)
        os.waitpid(launched, 0)
        with RunFolder(tmp_path).lock():
            pass
    finally:
        os.kill(int(worker_file.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_launch_that_waits_goes_on_when_the_other_is_killed(tmp_path: Path, capsys):
    ready = tmp_path / "ready"

    def launch() -> None:
        with RunFolder(tmp_path).lock(), RunFolder(tmp_path).update_results():
            ready.touch()
            time.sleep(60)

    launched = fork(launch)
    while not ready.exists():
        time.sleep(0.01)
    Timer(1.0, os.kill, (launched, signal.SIGKILL)).start()
    start = time.monotonic()
    with RunFolder(tmp_path).update_results(), RunFolder(tmp_path).lock():
        assert 0.5 < time.monotonic() - start < 30
    os.waitpid(launched, 0)
    (line,) = capsys.readouterr().out.splitlines()  # The second lock is free by now.
    assert line == f"Another process is at work on {tmp_path}/results.json: waiting for 100 s for its end"


def test_patience_outlasts_the_lease_of_a_machine_that_crashed():
    text = (Path(__file__).parents[1] / "docs/launching.md").read_text()
    assert 90 < LOCK_PATIENCE < 120 and f"for at most {LOCK_PATIENCE:g}\n  seconds" in text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_keeps_nothing_out(number: int, tmp_path: Path, impatient: None, monkeypatch):
    def fail(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", fail)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(RunFolder(tmp_path).lock())


def test_lock_file_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError), RunFolder(tmp_path).lock():
        pass
