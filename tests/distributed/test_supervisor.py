"""The supervisor: settings, error reports, stop requests, and no processes left over."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sandbox.cli.errors import report
from sandbox.contracts import ConfigError, DataError, Diverged, Preempted, SizeError
from sandbox.distributed import signals
from sandbox.distributed.rank import Rank
from sandbox.distributed.rank_handle import RankError, RankLost
from sandbox.distributed.rank_process import error_report, external_rank
from sandbox.distributed.supervisor import CONNECT_ATTEMPTS, launch
from tests.launch_helpers import alive, lines, supervisor, wait_until

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def targets(monkeypatch):
    """Ranks search where this process does: they find launch_targets."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def run(function: str, settings: object = None, processes: int = 1, **more: object) -> object:
    """One server that has imported torch alone serves all of these tests: lightning takes 10 s."""
    more = {"preload": ["torch"], "timeout": 60.0, **more}
    return launch(f"launch_targets:{function}", settings, processes, **more)


def send_when_working(log: Path, count: int, *signals: int) -> None:
    """Sends signals as soon as `count` ranks work.

    They meet the thread that sends them: so they do not wake the main one, as one that comes when
    that is about to wait. All are different: two of a kind are one where the first has not been
    looked at.
    """

    def send() -> None:
        wait_until(lambda: len(lines(log, "working")) == count)
        for number in signals:
            signal.pthread_kill(threading.get_ident(), number)

    threading.Thread(target=send, daemon=True).start()


# --- what ranks get -------------------------------------------------------------------------------


def test_settings_arrive_and_rank_0_returns_its_result():
    settings = {"root": {"lr": 1e-4, "betas": (0.9, None)}, "words": ["a", True]}
    result = run("facts", settings)
    assert result["settings"] == settings
    assert result["numbers"] == [0, 1, 0, 1]
    assert result["pid"] != os.getpid()


def test_two_ranks_connect_and_only_the_first_writes_to_stdout(log, capfd):
    assert run("greet", {"log": str(log)}, 2) == [0, {"from": 0}]
    assert lines(log, "heard") == ["heard 0", "heard 0"]
    said = capfd.readouterr()
    assert said.out == "stdout of 0\n"
    assert sorted(said.err.splitlines()) == ["rank 1: stderr of 1", "stderr of 0"]


def test_a_variable_set_after_the_server_has_started_arrives(monkeypatch):
    run("facts")
    monkeypatch.setenv("SANDBOX_LATE", "yes")
    assert run("facts")["environment"]["SANDBOX_LATE"] == "yes"
    monkeypatch.delenv("SANDBOX_LATE")
    assert "SANDBOX_LATE" not in run("facts")["environment"]


def test_what_another_launcher_left_in_the_environment_does_no_harm(monkeypatch):
    left = {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1", "NODE_RANK": "2"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    result = run("facts", None, 2)
    assert result["numbers"] == [0, 2, 0, 2]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_PORT")
    found = [result["environment"].get(n) for n in names]
    assert found == ["0", "2", "0", "0", None]


def test_data_workers_of_a_rank_start_as_they_do_in_any_process():
    assert run("facts")["start_method"] == multiprocessing.get_all_start_methods()[0]


def test_ranks_work_in_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("facts")["folder"] == str(tmp_path)


def test_the_process_that_launches_is_as_it_was():
    def state() -> list[object]:
        handlers = [signal.getsignal(s) for s in signals.SIGNALS]
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return [dict(os.environ), handlers, masked, sys.modules["__main__"], os.getcwd(), sys.path]

    before = state()
    run("facts", None, 2)
    with pytest.raises(RankError):
        run("fail", {"rank": 0, "how": "error"}, 2)
    assert state() == before


@pytest.mark.parametrize("settings", [{"a": [Path("x")]}, {"a": {1j: 0}}, {1, 2}])
def test_settings_that_are_not_plain_are_refused_before_a_start(settings):
    with pytest.raises(TypeError, match="want plain containers"):
        run("facts", settings)


def test_a_result_that_is_not_plain_is_the_ranks_error():
    with pytest.raises(RankError, match=r"rank 0: TypeError: the result.path is a PosixPath"):
        run("unplain")


def test_launching_does_not_import_torch():
    code = "import sys, sandbox.distributed.supervisor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    "how, message",
    [
        ("error", "ValueError: planned failure"),
        ("kill", "killed by SIGKILL (the system does so when memory runs out)"),
    ],
)
def test_the_rank_that_fails_is_named_with_its_own_error(how, message, culprit, log):
    with pytest.raises(RankError) as caught:
        run("fail", {"rank": culprit, "how": how, "log": str(log)}, 2)
    assert str(caught.value) == f"rank {culprit}: {message}"
    assert caught.value.exit_code == (5 if how == "kill" else 1)
    assert not alive(log)


def test_a_rank_that_exits_without_a_report_is_named():
    with pytest.raises(RankError, match=r"rank 1: exited without a report \(exit code 3\)"):
        run("fail", {"rank": 1, "how": "leave"}, 2)


@pytest.mark.parametrize(
    "how, culprit",
    [
        ("hang", 0),
        pytest.param("hang", 1, marks=pytest.mark.slow),
        pytest.param("stop", 0, marks=pytest.mark.slow),
        ("stop", 1),
    ],
)
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(log, how, culprit, capsys):
    message = f"rank {culprit}: no answer to rank {1 - culprit}, which has given up"
    with pytest.raises(RankLost, match=message) as caught:
        run("fail", {"rank": culprit, "how": how, "log": str(log)}, 2, timeout=4.0)
    assert not alive(log)
    assert caught.value.exit_code == 5
    report(caught.value)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "bug" not in printed
    assert printed.count("\n") == 1 and len(printed) < 400


@pytest.mark.slow
def test_a_stopped_rank_that_others_wait_for_without_a_timeout_is_named(log):
    with pytest.raises(RankLost, match=r"rank 0: stopped for more than 2 s \(SIGSTOP\)"):
        run("first", {"log": str(log)}, 2, timeout=2.0)
    assert not alive(log)


def test_ranks_that_do_not_connect_are_started_again(log, capfd, monkeypatch):
    monkeypatch.setenv("FAILING_STARTS_LOG", str(log))
    monkeypatch.setenv("FAILING_STARTS", "1")
    assert launch("failing_rendezvous:count", None, 2) == 2
    assert capfd.readouterr().err.count("did not connect; starting them again") == 1


@pytest.mark.slow
def test_ranks_that_never_connect_are_an_error(log, monkeypatch):
    monkeypatch.setenv("FAILING_STARTS_LOG", str(log))
    monkeypatch.setenv("FAILING_STARTS", "9")
    # The error of the rank that gives up first.
    with pytest.raises(RankError, match=r"lost contact with the other ranks|no answer to rank"):
        launch("failing_rendezvous:count", None, 2)
    assert log.read_text().count("started") == CONNECT_ATTEMPTS


def test_an_error_of_ours_comes_back_as_itself():
    with pytest.raises(SizeError) as caught:
        run("fail", {"rank": 1, "how": "misfit"}, 2)
    assert (caught.value.field, caught.value.value, caught.value.rule) == ("frames", 7, "4 k + 1")


def test_every_error_has_the_traceback_of_its_rank():
    with pytest.raises(Diverged) as caught:
        run("fail", {"rank": 1, "how": "diverged"}, 2)
    assert caught.value.exit_code == 4
    assert "rank 1:" in str(caught.value.__cause__)
    assert "in _diverged" in str(caught.value.__cause__)


def test_an_error_that_cannot_be_pickled_is_still_reported():
    with pytest.raises(RankError, match="rank 0: Stranger: a failure of size 4") as caught:
        run("fail", {"rank": 0, "how": "strange error"}, 1)
    assert "in _strange" in str(caught.value.__cause__)


def test_a_rank_error_survives_pickling():
    report = error_report(ValueError("x"), index=1)
    again = pickle.loads(pickle.dumps(report["error"]))
    assert (str(again), report["trace"]) == ("rank 1: ValueError: x", "ValueError: x\n")


def test_an_error_that_follows_from_a_lost_contact_is_not_an_own_one():
    try:
        try:
            raise RuntimeError("[/src/gloo/tcp/pair.cc:561] Connection closed by peer [::1]:25")
        finally:
            _ = {}["cleaning up"]
    except KeyError as e:
        assert error_report(e)["lost_contact"]
        assert not error_report(ValueError("x"))["lost_contact"]


def test_a_module_that_cannot_be_imported_is_the_ranks_error():
    with pytest.raises(RankError, match="rank 0: ModuleNotFoundError: No module named 'nowhere'"):
        launch("nowhere:f", None, preload=["torch"])


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_ranks_after_the_same_step(number, log):
    send_when_working(log, 2, number)
    with pytest.raises(Preempted, match=f"stopped by {number.name}"):
        run("count", {"log": str(log)}, 2)
    first, second = lines(log, "stopped")
    assert first == second
    assert not alive(log)


def test_the_third_signal_ends_ranks_that_ignore_requests(log):
    send_when_working(log, 1, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        run("deaf", {"log": str(log)})
    assert not alive(log)


def test_a_signal_to_one_rank_stops_all(log):
    def send() -> None:
        wait_until(lambda: len(lines(log, "working")) == 2)
        os.kill(int(log.read_text().split()[0]), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        run("count", {"log": str(log)}, 2)


def test_ctrl_c_in_a_terminal_stops_all_ranks_and_leaves_with_75(log):
    with supervisor("count", log) as process:
        wait_until(lambda: len(lines(log, "working")) == 2)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 75
        assert "stopped by SIGINT" in said
        assert "Traceback" not in said
        assert len(set(lines(log, "stopped"))) == 1
        assert not alive(log)


def test_no_rank_outlives_a_supervisor_that_is_killed(log):
    with supervisor("deaf", log) as process:
        wait_until(lambda: len(lines(log, "working")) == 2)
        process.kill()
        process.communicate(timeout=300)
        wait_until(lambda: not alive(log))


# --- no supervisor --------------------------------------------------------------------------------


def test_in_process_the_rank_is_this_process(monkeypatch):
    result = run("facts", {"a": 1}, in_process=True)
    assert (result["pid"], result["numbers"]) == (os.getpid(), [0, 1, 0, 1])


def test_in_process_an_error_stays_as_it_is():
    with pytest.raises(ValueError, match="planned failure"):
        run("fail", {"rank": 0, "how": "error"}, in_process=True)


def test_in_process_a_signal_requests_a_stop_and_a_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    alone = Rank()
    with alone.handling_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert alone.agree_to_stop() == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGINT)
        assert alone.stop_signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_that_a_library_has_replaced_are_put_back():
    alone = Rank()
    with alone.handling_signals(), alone.handling_signals():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        alone.install_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert alone.stop_signal == "SIGTERM"


FORKS = """
import multiprocessing, signal, time
from sandbox.rank import Rank

fork = multiprocessing.get_context("fork")
started = fork.Event()


def sleep():
    started.set()
    time.sleep(600)


with Rank().handling_signals():
    child = fork.Process(target=sleep, daemon=True)
    child.start()
    started.wait(300)  # a signal that comes earlier is lost in Python's own fork
    child.terminate()
    child.join(300)
print(child.exitcode - 128 == signal.SIGTERM)
"""


def test_a_process_that_a_rank_forks_can_be_terminated():
    """In a process of its own: this one has threads, with which a fork may hang."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "4"}, None),
        ({"TORCHELASTIC_RUN_ID": "left over"}, None),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
             "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
            (3, 4, 1, 2, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # sbatch's script
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
             "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
            (3, 4, 1, 2, 1),
        ),
    ],
)  # fmt: skip
def test_torchrun_and_srun_are_distinguished_from_leftover_variables(environ, expected):
    found = external_rank(environ)
    names = ("index", "world", "local", "local_world", "node")
    assert (found and tuple(getattr(found[0], n) for n in names)) == expected


def test_another_number_of_processes_than_torchrun_started_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ConfigError, match=r"processes=4: .* want 2"):
        run("facts", None, 4)


@pytest.mark.parametrize("kind", [DataError, Diverged, Preempted])
def test_sandbox_errors_are_reported_with_class_and_code(kind):
    error = pickle.loads(pickle.dumps(error_report(kind("why"))["error"]))
    assert (type(error), error.exit_code, str(error)) == (kind, kind.exit_code, "why")


def test_an_error_of_a_plugin_is_reported_as_one_that_the_supervisor_knows():
    class OutOfTokens(DataError):
        exit_code = 9

        def __init__(self, count: int, of: int) -> None:
            super().__init__(f"{count} tokens, want {of}")

    error = pickle.loads(pickle.dumps(error_report(OutOfTokens(1, 2))["error"]))
    assert (type(error), error.exit_code, str(error)) == (DataError, 9, "1 tokens, want 2")
