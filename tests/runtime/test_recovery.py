"""The runtime ends and comes back at any moment; conmon, runc and containers are killed: state is right and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from knarr.runtime import disk
from knarr.runtime.cgroups import Cgroups
from knarr.runtime.cri import ContainerState, RuntimeFault, SandboxState
from knarr.runtime.runc import Runc
from tests.runtime.conftest import Bench, mounts_below, processes_naming


async def test_running_containers_are_found_again(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
    before = await bench.runtime.container_status(container_id)
    await bench.restart()
    after = await bench.runtime.container_status(container_id)
    assert after == before
    assert (await bench.runtime.exec_sync(container_id, ["echo", "x"])).stdout == b"x\n"
    await bench.runtime.stop_container(container_id, 5)
    assert (await bench.runtime.container_status(container_id)).exit_code == 5


async def test_an_end_that_happened_while_nobody_watched_is_found(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "sleep 0.3; echo last words; exit 42")
    begin = time.time_ns()
    await bench.runtime.close()
    await asyncio.sleep(0.7)
    bench.runtime = bench.make()
    await bench.runtime.start()
    status = await bench.ended(container_id)
    assert (status.exit_code, status.reason) == (42, "Error")
    assert begin < status.finished_at_ns < begin + 600_000_000
    assert bench.log(status) == "last words\n"


async def test_a_created_container_can_be_started_after_a_restart(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.runtime.create_container(sandbox_id, bench.container("sh", "-c", "exit 4"))
    await bench.restart()
    await bench.runtime.start_container(container_id)
    assert (await bench.ended(container_id)).exit_code == 4


async def test_sandbox_facts_survive_a_restart(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(labels={"a": "b"}))
    before = await bench.runtime.pod_sandbox_status(sandbox_id)
    await bench.restart()
    assert await bench.runtime.pod_sandbox_status(sandbox_id) == before
    assert [item.id for item in await bench.runtime.list_pod_sandboxes({"a": "b"})] == [sandbox_id]
    assert await bench.runtime.list_pod_sandboxes({"a": "c"}) == []


async def test_a_killed_conmon_ends_its_container(bench: Bench) -> None:
    container_id = await bench.run("sleep", "1000")
    os.kill(int((bench.folder / f"state/containers/{container_id}/conmon.pid").read_text()), signal.SIGKILL)
    status = await bench.ended(container_id)
    assert status.exit_code == 137
    assert status.reason == "Error"
    assert "conmon" in status.message
    await bench.runtime.remove_container(container_id)
    assert processes_naming(container_id) == []


async def test_conmon_killed_while_the_runtime_is_down(bench: Bench) -> None:
    container_id = await bench.run("sleep", "1000")
    await bench.runtime.close()
    os.kill(int((bench.folder / f"state/containers/{container_id}/conmon.pid").read_text()), signal.SIGKILL)
    bench.runtime = bench.make()
    await bench.runtime.start()
    assert (await bench.ended(container_id)).exit_code == 137


async def test_after_a_restart_of_the_machine_everything_is_over_but_known(bench: Bench) -> None:
    """The volatile folder is gone and every process has ended."""
    container_id = await bench.run("sleep", "1000")
    sandbox_id = (await bench.runtime.container_status(container_id)).sandbox_id
    await bench.runtime.close()
    conmon = int((bench.folder / f"state/containers/{container_id}/conmon.pid").read_text())
    pid = int((bench.folder / f"state/containers/{container_id}/pid").read_text())
    for number in (conmon, pid):
        os.kill(number, signal.SIGKILL)
    await asyncio.sleep(0.2)
    import shutil
    import subprocess

    for mount in reversed(mounts_below(bench.folder)):
        subprocess.run(["umount", "-l", mount], check=True)
    shutil.rmtree(bench.folder / "state")
    bench.runtime = bench.make()
    await bench.runtime.start()
    status = await bench.ended(container_id)
    assert (status.state, status.exit_code) == (ContainerState.EXITED, 255)
    assert (await bench.runtime.pod_sandbox_status(sandbox_id)).state is SandboxState.NOTREADY
    await bench.runtime.remove_pod_sandbox(sandbox_id)


async def test_damaged_records_do_not_stop_the_others(bench: Bench) -> None:
    broken, whole = await bench.run("sleep", "1000", name="a"), await bench.run("sleep", "1000", name="b")
    (bench.folder / f"root/containers/{broken}/container.json").write_text("{")
    await bench.restart()
    assert [item.id for item in await bench.runtime.list_containers()] == [whole]
    assert processes_naming(broken) == []


async def test_a_start_interrupted_by_a_crash_is_taken_back(bench: Bench) -> None:
    """conmon has created the container but nobody let it go."""
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.runtime.create_container(sandbox_id, bench.container("sleep", "1000"))
    containers = bench.runtime._containers

    async def crash(*_: object) -> None:
        raise asyncio.CancelledError

    containers._runc.start = crash  # type: ignore[method-assign]
    containers._kill_leftovers = lambda _: asyncio.sleep(0)  # type: ignore[method-assign,assignment]
    with contextlib.suppress(asyncio.CancelledError):
        await bench.runtime.start_container(container_id)
    assert processes_naming(container_id)
    await bench.restart()
    status = await bench.runtime.container_status(container_id)
    assert status.state is ContainerState.CREATED, "its program never ran: an end would make a pod that runs once fail"
    assert processes_naming(container_id) == []
    await bench.runtime.remove_container(container_id)


@pytest.mark.parametrize("seed", range(2))
async def test_random_kills_during_churn_leak_nothing(bench: Bench, seed: int) -> None:
    """conmon, runc and container processes are killed at random while pods come and go, and the runtime is restarted twice."""
    chance = random.Random(seed)
    stop = time.monotonic() + 3
    kills = 0

    async def killer() -> None:
        nonlocal kills
        while time.monotonic() < stop:
            await asyncio.sleep(chance.uniform(0.005, 0.06))
            pids = []
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    with contextlib.suppress(OSError):
                        command = Path(f"/proc/{entry}/cmdline").read_bytes()
                        if str(bench.folder).encode() in command and int(entry) != os.getpid():
                            pids.append(int(entry))
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    kills += 1

    async def churn() -> None:
        while time.monotonic() < stop:
            runtime = bench.runtime
            with contextlib.suppress(RuntimeFault, OSError):
                sandbox_id = await runtime.run_pod_sandbox(bench.sandbox())
                for name in ("a", "b"):
                    container_id = await runtime.create_container(sandbox_id, bench.container("sh", "-c", "sleep 0.1; echo x; sleep 5", name=name))
                    await runtime.start_container(container_id)
                    await runtime.exec_sync(container_id, ["true"], 5)
                await runtime.stop_container(container_id, 0.1)
                await runtime.remove_pod_sandbox(sandbox_id)

    churning = [asyncio.ensure_future(churn()) for _ in range(3)]

    async def restarts() -> None:
        for _ in range(2):
            await asyncio.sleep(1.0)
            await bench.kill()
            for task in churning:
                task.cancel()
            await asyncio.wait(churning)
            await bench.revive()
            churning[:] = [asyncio.ensure_future(churn()) for _ in range(3)]

    async with asyncio.timeout(90):
        await asyncio.gather(killer(), restarts())
        await asyncio.wait(churning)
    assert kills > 2
    await bench.restart()
    for container in await bench.runtime.list_containers():
        assert container.state in (ContainerState.RUNNING, ContainerState.EXITED, ContainerState.CREATED)
    await bench.clean()
    assert await bench.runtime.list_containers() == []
    assert mounts_below(bench.folder) == []
    assert processes_naming(str(bench.folder)) == []
    assert list((bench.folder / "state/containers").iterdir()) == []
    assert list((bench.folder / "state/sandboxes").iterdir()) == []
    assert list((bench.folder / "root/containers").iterdir()) == []
    assert list((bench.folder / "state/exits").iterdir()) == []
    assert list((bench.folder / "state/oci").iterdir()) == []
    for controller in ("memory", "pids"):
        assert list(Path(f"/sys/fs/cgroup/{controller}/{bench.group}").glob("*/*/")) == []


async def test_a_full_disk_is_a_fault_and_hides_no_end(image_folder: Path) -> None:
    """The data folder has no byte left: starts fail cleanly, ends are seen, and with room again everything goes on."""
    import shutil
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="runtime-test-", dir="/tmp"))
    (folder / "root").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder / "root")], check=True)
    bench = Bench(folder, f"/knarr-test-{folder.name[-8:]}")
    try:
        subprocess.run(["cp", "-a", str(image_folder), str(folder / "root/images")], check=True)
        await bench.runtime.start()
        container_id = await bench.run("sh", "-c", "while [ ! -e /go ]; do sleep 0.02; done; exit 9")
        pid = (await bench.runtime.container_status(container_id)).pid
        with contextlib.suppress(OSError), (folder / "root/fill").open("wb") as fill:
            while True:
                fill.write(bytes(4096))
                fill.flush()
        with pytest.raises(RuntimeFault, match="No space left"):
            await bench.run("true")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert (await bench.ended(container_id)).exit_code == 137
        (folder / "root/fill").unlink()
        assert len(await bench.runtime.list_containers()) == 1
        assert (await bench.output("echo", "again"))[1] == "again\n"
        await bench.restart()
        assert (await bench.ended(container_id)).exit_code == 137
        await bench.clean()
        assert processes_naming(str(folder)) == []
    finally:
        with contextlib.suppress(Exception):
            await bench.clean()
        await bench.runtime.close()
        Cgroups().remove(bench.group)
        for mount in reversed(mounts_below(folder)):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("how", ["a full disk", "a cancellation"])
async def test_a_start_that_cannot_be_recorded_is_still_a_start(bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What has been let go runs: it may neither be shown as running for ever nor be killed and started a second time."""
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.runtime.create_container(sandbox_id, bench.container("sh", "-c", "sleep 0.5; exit 7"))
    runc_start, write_record = Runc.start, disk.write_record
    starting: asyncio.Task[None]

    async def start(runc: Runc, *args: str) -> None:
        await runc_start(runc, *args)
        if how == "a cancellation":
            asyncio.get_running_loop().call_soon(starting.cancel)
            return

        def refuse(path: str, record: object, *, sync: bool = False) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(disk, "write_record", refuse)

    monkeypatch.setattr(Runc, "start", start)
    starting = asyncio.ensure_future(bench.runtime.start_container(container_id))
    await asyncio.wait({starting})
    assert (await bench.runtime.container_status(container_id)).state is ContainerState.RUNNING
    monkeypatch.setattr(disk, "write_record", write_record)
    await bench.restart()
    async with asyncio.timeout(10):
        assert (await bench.ended(container_id)).exit_code == 7
