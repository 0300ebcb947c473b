"""The life of sandboxes and containers on the embedded runtime, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from knarr.runtime.cri import ContainerState, Mount, NotFound, RuntimeFault, SandboxState
from tests.runtime.conftest import Bench, processes_naming


async def test_a_container_runs_and_its_exit_code_and_log_are_there(bench: Bench) -> None:
    code, log = await bench.output("sh", "-c", "echo hello; echo error >&2; exit 3")
    assert code == 3
    assert sorted(log.splitlines()) == ["error", "hello"]


async def test_reasons_are_completed_for_zero_and_error_for_others(bench: Bench) -> None:
    good, bad = await bench.run("true"), await bench.run("false")
    assert (await bench.ended(good)).reason == "Completed"
    assert (await bench.ended(bad)).reason == "Error"


async def test_state_goes_from_created_over_running_to_exited(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.runtime.create_container(sandbox_id, bench.container("sleep", "1000"))
    assert (await bench.runtime.container_status(container_id)).state is ContainerState.CREATED
    await bench.runtime.start_container(container_id)
    status = await bench.runtime.container_status(container_id)
    assert status.state is ContainerState.RUNNING
    assert status.pid > 0
    await bench.runtime.stop_container(container_id, 0)
    status = await bench.runtime.container_status(container_id)
    assert (status.state, status.exit_code, status.signal) == (ContainerState.EXITED, 137, 9)
    assert status.created_at_ns < status.started_at_ns < status.finished_at_ns


async def test_a_stop_signal_is_honoured_before_the_timeout(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done")
    await _log_has(bench, container_id, "up")
    begin = time.monotonic()
    await bench.runtime.stop_container(container_id, 10)
    assert time.monotonic() - begin < 2
    assert (await bench.runtime.container_status(container_id)).exit_code == 7


async def test_a_stop_right_after_the_start_reaches_the_containers_program_and_not_the_runtimes(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    codes = []
    for number in range(12):
        container_id = await bench.run("false", sandbox_id=sandbox_id, name=f"c{number}")
        await bench.runtime.stop_container(container_id, 5)
        codes.append((await bench.runtime.container_status(container_id)).exit_code)
        await bench.runtime.remove_container(container_id)
    # The first process of a container takes no signal that it does not handle.
    assert codes == [1] * 12


async def test_a_directory_of_the_host_that_is_missing_is_made_for_its_mount(bench: Bench, tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    code, log = await bench.output("sh", "-c", "echo x > /m/f; stat -c %a /m", mounts=[Mount("/m", str(missing))])
    assert (code, log) == (0, "755\n")
    assert (missing / "f").read_text() == "x\n"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(RuntimeFault, match="failed to mkdir"):
        await bench.run("true", mounts=[Mount("/m", str(tmp_path / "link"))])


async def test_an_own_stop_signal_is_sent(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "trap 'exit 9' USR1; echo up; while :; do sleep 0.05; done", stop_signal="SIGUSR1")
    await _log_has(bench, container_id, "up")
    await bench.runtime.stop_container(container_id, 10)
    assert (await bench.runtime.container_status(container_id)).exit_code == 9


async def test_a_command_that_does_not_exist_is_a_start_error_with_code_128(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    container_id = await bench.runtime.create_container(sandbox_id, bench.container("no-such-command"))
    with pytest.raises(RuntimeFault, match=r'exec: "no-such-command": executable file not found in \$PATH'):
        await bench.runtime.start_container(container_id)
    status = await bench.runtime.container_status(container_id)
    assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 128, "StartError")
    assert "executable file not found" in status.message
    assert status.started_at_ns == 0


async def test_stop_and_remove_are_idempotent(bench: Bench) -> None:
    container_id = await bench.run("sleep", "1000")
    sandbox_id = (await bench.runtime.container_status(container_id)).sandbox_id
    for _ in range(2):
        await bench.runtime.stop_container(container_id, 0)
    for _ in range(2):
        await bench.runtime.remove_container(container_id)
    for _ in range(2):
        await bench.runtime.stop_pod_sandbox(sandbox_id)
    assert (await bench.runtime.pod_sandbox_status(sandbox_id)).state is SandboxState.NOTREADY
    for _ in range(2):
        await bench.runtime.remove_pod_sandbox(sandbox_id)
    with pytest.raises(NotFound):
        await bench.runtime.pod_sandbox_status(sandbox_id)


async def test_stopping_a_sandbox_kills_its_containers(bench: Bench) -> None:
    container_id = await bench.run("sleep", "1000")
    sandbox_id = (await bench.runtime.container_status(container_id)).sandbox_id
    await bench.runtime.stop_pod_sandbox(sandbox_id)
    assert (await bench.runtime.container_status(container_id)).state is ContainerState.EXITED


async def test_events_come_in_order(bench: Bench) -> None:
    events = bench.runtime.events()
    container_id = await bench.run("true")
    await bench.ended(container_id)
    await bench.runtime.remove_container(container_id)
    seen = []
    async for event in events:
        seen.append(event.type)
        if event.type == "DELETED":
            break
    assert seen == ["CREATED", "STARTED", "STOPPED", "DELETED"]


async def test_containers_of_a_pod_share_network_ipc_and_host_name_but_not_processes(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    links = []
    for name in ("a", "b"):
        _, log = await bench.output("sh", "-c", "hostname; readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; echo $$", sandbox_id=sandbox_id, name=name)
        links.append(log)
    assert links[0] == links[1]
    assert links[0].startswith("pod\n")
    assert links[0].endswith("\n1\n")


async def test_a_failing_network_leaves_no_sandbox(bench: Bench) -> None:
    bench.network.failure = RuntimeFault("no addresses left")
    with pytest.raises(RuntimeFault, match="no addresses left"):
        await bench.runtime.run_pod_sandbox(bench.sandbox())
    assert await bench.runtime.list_pod_sandboxes() == []
    assert list((bench.folder / "state/sandboxes").iterdir()) == []
    assert list((bench.folder / "root/sandboxes").iterdir()) == []


async def test_a_start_cancelled_at_any_moment_leaves_nothing_running(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03):
        container_id = await bench.runtime.create_container(sandbox_id, bench.container("sleep", "1000", name=f"d{delay}"))
        task = asyncio.ensure_future(bench.runtime.start_container(container_id))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await bench.runtime.remove_container(container_id)
        assert processes_naming(container_id) == []


async def test_thirty_containers_start_eight_at_a_time(bench: Bench) -> None:
    slots = asyncio.Semaphore(8)

    async def one() -> None:
        async with slots:
            await bench.run("sleep", "1000")

    begin = time.monotonic()
    await asyncio.gather(*(one() for _ in range(30)))
    assert time.monotonic() - begin < 6
    assert len(await bench.runtime.list_containers()) == 30


async def _log_has(bench: Bench, container_id: str, text: str) -> None:
    path = Path((await bench.runtime.container_status(container_id)).log_path)
    async with asyncio.timeout(5):
        while text not in path.read_text():
            await asyncio.sleep(0.01)


async def test_containers_that_end_at_once_are_never_missed(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    slots = asyncio.Semaphore(6)

    async def one(number: int) -> None:
        async with slots:
            container_id = await bench.run("sh", "-c", f"exit {number % 7}", sandbox_id=sandbox_id, name=f"c{number}")
            async with asyncio.timeout(20):
                status = await bench.ended(container_id)
            assert status.exit_code == number % 7
            if number % 2:
                await bench.runtime.remove_container(container_id)

    events = bench.runtime.events()
    await asyncio.gather(*(one(number) for number in range(60)))
    seen: dict[str, list[str]] = {}
    async with asyncio.timeout(10):
        async for event in events:
            seen.setdefault(event.container_id, []).append(event.type)
            if sum(kinds.count("STOPPED") for kinds in seen.values()) == 60:
                break
    assert all(kinds[:3] == ["CREATED", "STARTED", "STOPPED"] for kinds in seen.values())
    before = {item.id: item for item in await bench.runtime.list_containers()}
    await bench.restart()
    assert {item.id: item for item in await bench.runtime.list_containers()} == before


async def test_a_runtime_handler_chooses_the_program(bench: Bench) -> None:
    wrapper = bench.folder / "myrunc"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {bench.folder}/calls\nexec runc "$@"\n')
    wrapper.chmod(0o755)
    await bench.runtime.close()
    bench.runtime = bench.make(handlers={"mine": str(wrapper), "absent": "/no/such/program"})
    await bench.runtime.start()
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(), "mine")
    container_id = await bench.run("sleep", "1000", sandbox_id=sandbox_id)
    assert (await bench.runtime.exec_sync(container_id, ["echo", "x"])).stdout == b"x\n"
    await bench.restart()
    calls = (bench.folder / "calls").read_text()
    assert "create" in calls
    assert "exec" in calls
    assert (await bench.runtime.pod_sandbox_status(sandbox_id)).runtime_handler == "mine"
    for handler, message in (("other", 'no runtime for "other" is configured'), ("absent", "not installed|no runtime")):
        with pytest.raises(RuntimeFault, match=message):
            await bench.runtime.run_pod_sandbox(bench.sandbox(), handler)
