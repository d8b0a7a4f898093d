"""`accelerate_configs/slurm.sh` itself, with shell scripts in the place of Slurm's commands and of `accelerate`."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
RUNNING = "JobState=RUNNING Reason=None\n   PreemptEligibleTime=2026-11-21T20:47:03 PreemptTime=None"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-21T20:47:09")
ENDING = RUNNING.replace("RUNNING", "COMPLETING")
RECORD = """#!/bin/bash
record() { line=$(printf '%q ' "$@"); echo "$line" >>"$FOLDER/calls"; }
"""
COMMANDS = {
    # the step on each node, whose processes get a signal together; its exit code is the highest
    "srun": """record srun "$@"
        while [[ $1 == -* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do
            SLURM_NODEID=$node setsid "$@" &
            echo $! >>"$FOLDER/steps"
        done
        highest=0
        for step in $(<"$FOLDER/steps"); do
            wait "$step"
            code=$?
            ((code > highest)) && highest=$code
        done
        exit "$highest"
    """,
    "scontrol": """case "$*" in
            "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
            "show job 7") echo "JobId=7 JobName=x"; echo "   $JOB" ;;
            *) record scontrol "$@" ;;
        esac
    """,
    "scancel": """record scancel "$@"
        for step in $(<"$FOLDER/steps"); do kill -TERM -- "-$step"; done
    """,
    # ends with $RUN, or takes a while to save what it is told to stop at and fails, as torch's launcher does. With
    # $ALONE it is the launcher of a single process, which dies at once and leaves the run to save
    "accelerate": """run() {
            trap 'sleep 0.3; record saved "$SLURM_NODEID"; echo "saved on $SLURM_NODEID"; exit "${SAVED:-1}"' TERM
            record accelerate "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"
            [[ $RUN ]] && exit "$RUN"
            while :; do sleep 0.05; done
        }
        if [[ $ALONE ]]; then
            run "$@" &
            wait
        else
            run "$@"
        fi
    """,
    # reads what a step prints, once a signal does not end it
    "cat": """record cat
        exec /bin/cat
    """,
}
ARGUMENTS = ["my recipes/moco.yaml", "output_dir=runs/a b", "schedule=[{until: 1.0}]"]


class Job:
    """The script as a job on two machines; `setting`s are for the stand-ins."""

    def __init__(self, folder: Path, **setting: str):
        self.folder = folder
        for name, body in COMMANDS.items():
            (folder / name).write_text(RECORD + body)
            (folder / name).chmod(0o755)
        slurm = {"JOB_ID": "7", "NNODES": "2", "JOB_NODELIST": "n[1-2]", "GPUS_ON_NODE": "8", "CPUS_PER_TASK": "12"}
        environment = (
            {f"SLURM_{key}": value for key, value in slurm.items()} | {"JOB": RUNNING, "RUN": "", "ALONE": ""} | setting
        )
        environment |= {"FOLDER": str(folder), "PATH": f"{folder}:{os.defpath}"}
        command = ["bash", str(ROOT / "accelerate_configs/slurm.sh"), *ARGUMENTS]
        self.script = subprocess.Popen(command, cwd=ROOT, env=environment)

    def calls(self, *names: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [call for call in map(shlex.split, lines) if call[0] in names]

    def wait_until_it_runs(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.calls("accelerate", "cat")) < 4:
            assert time.monotonic() < deadline and self.script.poll() is None
            time.sleep(0.02)

    def signal_steps(self) -> None:
        for step in (self.folder / "steps").read_text().split():
            os.killpg(int(step), signal.SIGTERM)

    def end(self) -> int:
        """Its exit code, once it has ended."""
        return self.script.wait(timeout=60)


@pytest.fixture
def job(tmp_path):
    """Starts a job; nothing of it is left behind."""
    jobs = []

    def start(**setting: str) -> Job:
        jobs.append(Job(tmp_path, **setting))
        return jobs[-1]

    yield start
    for job in jobs:
        job.script.kill()
        job.script.wait()
        for step in (tmp_path / "steps").read_text().split():
            subprocess.run(["kill", "-KILL", "--", f"-{step}"], check=False, capture_output=True)


def test_each_machine_gets_its_part(job: Callable[..., Job]):
    it = job(RUN="0")
    assert it.end() == 0
    (srun,) = it.calls("srun")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12"} <= set(srun)
    ranks = set()
    for _, seconds, command, *arguments in it.calls("accelerate"):
        launched = launch_command_parser().parse_args(arguments)
        ranks.add(launched.machine_rank)
        assert command == "launch" and 30 < int(seconds) < 300
        assert (ROOT / launched.config_file).is_file() and (ROOT / launched.training_script).is_file()
        assert (launched.num_machines, launched.num_processes) == (2, 16)
        assert (launched.main_process_ip, launched.main_process_port) == ("n1", 10007)
        assert launched.training_script_args == ARGUMENTS
    assert ranks == {0, 1} and not it.calls("scancel", "scontrol")


@pytest.mark.parametrize(("on_node", "expected"), [("64", 64), ("", 1)])
def test_cpus_that_were_not_asked_for_are_those_of_the_node(job: Callable[..., Job], on_node, expected):
    it = job(RUN="0", SLURM_CPUS_PER_TASK="", SLURM_CPUS_ON_NODE=on_node)
    assert it.end() == 0
    (srun,) = it.calls("srun")
    assert f"--cpus-per-task={expected}" in srun


def test_a_run_that_fails_is_not_queued_again(job: Callable[..., Job]):
    it = job(RUN="3")
    assert it.end() == 3 and not it.calls("scancel", "scontrol")


def test_warned_it_saves_and_then_queues_again(job: Callable[..., Job]):
    it = job()
    it.wait_until_it_runs()
    it.script.send_signal(signal.SIGTERM)
    assert it.end() == 1
    told, *saved, again = it.calls("scancel", "saved", "scontrol")
    assert told == ["scancel", "--signal=TERM", "7"]
    assert sorted(saved) == [["saved", "0"], ["saved", "1"]] and again == ["scontrol", "requeue", "7"]


def test_a_step_outlives_a_launcher_that_dies_at_once(job: Callable[..., Job]):
    it = job(ALONE="1")
    it.wait_until_it_runs()
    it.script.send_signal(signal.SIGTERM)
    assert it.end() == 143
    _, *saved, again = it.calls("scancel", "saved", "scontrol")
    assert sorted(saved) == [["saved", "0"], ["saved", "1"]] and again == ["scontrol", "requeue", "7"]


def test_preempted_with_a_grace_time_it_queues_again(job: Callable[..., Job]):
    it = job(JOB=PREEMPTED)
    it.wait_until_it_runs()
    it.signal_steps()
    assert it.end() == 1
    assert it.calls("scancel", "saved", "scontrol")[2:] == [["scontrol", "requeue", "7"]]


def test_cancelled_it_waits_and_stays_cancelled(job: Callable[..., Job]):
    it = job(JOB=ENDING)
    it.wait_until_it_runs()
    it.script.send_signal(signal.SIGTERM)
    it.signal_steps()
    assert it.end() == 1 and len(it.calls("saved")) == 2
    assert not it.calls("scancel", "scontrol")


def test_a_run_that_ends_well_after_a_warning_is_not_queued_again(job: Callable[..., Job]):
    it = job(SAVED="0")
    it.wait_until_it_runs()
    it.script.send_signal(signal.SIGTERM)
    assert it.end() == 0 and not it.calls("scontrol")
