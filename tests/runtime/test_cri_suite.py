"""One suite for every runtime behind the CRI: the embedded one, and containerd over gRPC. Shapes as cri-tools' critest asks."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from knarr.runtime.cri import (
    ContainerConfig,
    ContainerMetadata,
    ContainerSecurity,
    ContainerState,
    ContainerStatus,
    DeadlineExceeded,
    ImageService,
    LinuxResources,
    Mount,
    NamespaceOptions,
    NotFound,
    PodSandboxConfig,
    PodSandboxMetadata,
    RuntimeFault,
    RuntimeService,
    SandboxState,
    SeccompProfile,
)
from knarr.runtime.grpc_cri import GRPCRuntime
from tests.runtime.conftest import BUSYBOX, Bench
from tests.runtime.containerd import running_containerd


@dataclass
class Rig:
    runtime: RuntimeService
    images: ImageService
    folder: Path
    group: str
    tag: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def sandbox(self) -> PodSandboxConfig:
        uid = uuid.uuid4().hex
        config = PodSandboxConfig(PodSandboxMetadata("pod", uid, "default"), log_directory=str(self.folder / "logs" / uid), labels={"rig": self.tag, "uid": uid})
        config.namespaces = NamespaceOptions(network="NODE")
        config.cgroup_parent = f"{self.group}/pod{uid[:8]}"
        config.annotations = {"note": "sandbox"}
        return config

    def container(self, *command: str, name: str = "c", **fields: object) -> ContainerConfig:
        config = ContainerConfig(ContainerMetadata(name), BUSYBOX, command=list(command), log_path=f"{name}.log", labels={"rig": self.tag, "name": name})
        config.security = ContainerSecurity(namespaces=NamespaceOptions(network="NODE"))
        for key, value in fields.items():
            if key == "security":
                value.namespaces.network = "NODE"  # type: ignore[attr-defined]
            setattr(config, key, value)
        return config

    async def run(self, *command: str, **fields: object) -> tuple[str, str]:
        sandbox_id = await self.runtime.run_pod_sandbox(self.sandbox())
        container_id = await self.runtime.create_container(sandbox_id, self.container(*command, **fields))
        await self.runtime.start_container(container_id)
        return sandbox_id, container_id

    async def ended(self, container_id: str) -> ContainerStatus:
        async with asyncio.timeout(20):
            while True:
                status = await self.runtime.container_status(container_id)
                if status.state is ContainerState.EXITED:
                    return status
                await asyncio.sleep(0.05)

    async def output(self, *command: str, **fields: object) -> tuple[ContainerStatus, str]:
        _, container_id = await self.run(*command, **fields)
        status = await self.ended(container_id)
        lines = [line.split(" ", 3) for line in Path(status.log_path).read_text().splitlines()]
        return status, "".join(line[3] + ("\n" if line[2] == "F" else "") for line in lines)

    async def clean(self) -> None:
        for sandbox in await self.runtime.list_pod_sandboxes({"rig": self.tag}):
            await self.runtime.stop_pod_sandbox(sandbox.id)
            await self.runtime.remove_pod_sandbox(sandbox.id)


@pytest.fixture(params=["embedded", "containerd"])
async def rig(request: pytest.FixtureRequest, bench: Bench, containerd_folder: Path) -> AsyncIterator[Rig]:
    if request.param == "embedded":
        made = Rig(bench.runtime, bench.runtime, bench.folder, bench.group)
        yield made
        await made.clean()
        return
    runtime = GRPCRuntime(f"unix://{containerd_folder}/sock", str(bench.folder / "cri"))
    await runtime.start()
    made = Rig(runtime, runtime, bench.folder, bench.group)
    try:
        yield made
        await made.clean()
    finally:
        await runtime.close()


@pytest.fixture(scope="module")
def containerd_folder() -> object:
    assert shutil.which("containerd"), "containerd is among the Debian packages that the tests install"
    loop = asyncio.new_event_loop()
    context = running_containerd()
    folder = loop.run_until_complete(context.__aenter__())
    yield folder
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


async def test_version_and_conditions(rig: Rig) -> None:
    version = await rig.runtime.version()
    assert version.name
    assert version.version
    assert {item.type for item in await rig.runtime.status()} >= {"RuntimeReady", "NetworkReady"}


async def test_a_sandbox_is_listed_stopped_and_removed(rig: Rig) -> None:
    config = rig.sandbox()
    sandbox_id = await rig.runtime.run_pod_sandbox(config)
    status = await rig.runtime.pod_sandbox_status(sandbox_id)
    assert (status.state, status.metadata, status.labels, status.annotations) == (SandboxState.READY, config.metadata, config.labels, config.annotations)
    assert status.ips == []
    assert status.namespaces.network == "NODE"
    assert [item.id for item in await rig.runtime.list_pod_sandboxes({"uid": config.metadata.uid})] == [sandbox_id]
    await rig.runtime.stop_pod_sandbox(sandbox_id)
    assert (await rig.runtime.pod_sandbox_status(sandbox_id)).state is SandboxState.NOTREADY
    await rig.runtime.remove_pod_sandbox(sandbox_id)
    await rig.runtime.remove_pod_sandbox(sandbox_id)
    with pytest.raises(NotFound):
        await rig.runtime.pod_sandbox_status(sandbox_id)


async def test_a_container_runs_to_its_end(rig: Rig) -> None:
    status, log = await rig.output("sh", "-c", "echo out; echo $A; sleep 0.1; exit 3", env=[("A", "b")])
    assert (status.exit_code, status.reason, log) == (3, "Error", "out\nb\n")
    # containerd takes the time of the start only after it: a program that ends at once would have ended before.
    assert 0 < status.created_at_ns <= status.started_at_ns <= status.finished_at_ns
    assert status.image_id.startswith("sha256:")
    assert status.labels["name"] == "c"
    status, _ = await rig.output("true")
    assert (status.exit_code, status.reason) == (0, "Completed")


async def test_a_missing_command_is_a_start_error(rig: Rig) -> None:
    sandbox_id = await rig.runtime.run_pod_sandbox(rig.sandbox())
    container_id = await rig.runtime.create_container(sandbox_id, rig.container("no-such-thing"))
    with pytest.raises(RuntimeFault, match=r'exec: "no-such-thing": executable file not found in \$PATH'):
        await rig.runtime.start_container(container_id)
    status = await rig.runtime.container_status(container_id)
    assert (status.state, status.exit_code, status.reason) == (ContainerState.EXITED, 128, "StartError")
    assert status.message.startswith("failed to create")


async def test_stop_waits_for_the_grace_period_and_then_kills(rig: Rig) -> None:
    _, container_id = await rig.run("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    await asyncio.sleep(0.3)
    begin = asyncio.get_running_loop().time()
    await rig.runtime.stop_container(container_id, 1)
    assert 0.9 < asyncio.get_running_loop().time() - begin < 5
    assert (await rig.ended(container_id)).exit_code == 137
    await rig.runtime.stop_container(container_id, 1)
    await rig.runtime.remove_container(container_id)
    await rig.runtime.remove_container(container_id)
    with pytest.raises(NotFound):
        await rig.runtime.container_status(container_id)


async def test_exec_sync_gives_output_code_and_obeys_its_limit(rig: Rig) -> None:
    _, container_id = await rig.run("sleep", "1000")
    result = await rig.runtime.exec_sync(container_id, ["sh", "-c", "echo a; echo b >&2; exit 4"], 10)
    assert (result.stdout, result.stderr, result.exit_code) == (b"a\n", b"b\n", 4)
    with pytest.raises(DeadlineExceeded):
        await rig.runtime.exec_sync(container_id, ["sleep", "100"], 1)
    with pytest.raises(RuntimeFault):
        await rig.runtime.exec_sync(container_id, ["no-such-thing"], 10)


async def test_exec_streams_carry_input_output_and_the_code(rig: Rig) -> None:
    _, container_id = await rig.run("sleep", "1000")
    stream = await rig.runtime.exec(container_id, ["sh", "-c", "cat; echo err >&2; exit 6"], tty=False, stdin=True)
    payload = b"line\n" * 20000

    async def feed() -> None:
        await stream.write_stdin(payload)
        await stream.close_stdin()

    feeding = asyncio.ensure_future(feed())
    found = {1: b"", 2: b""}
    async with asyncio.timeout(20):
        async for channel, data in stream.read():
            found[channel] += data
        await feeding
        assert await stream.wait() == 6
    await stream.close()
    assert found == {1: payload, 2: b"err\n"}


async def test_exec_with_a_terminal_is_resized(rig: Rig) -> None:
    _, container_id = await rig.run("sleep", "1000")
    script = "i=0; while [ \"$(stty size 2>/dev/null)\" != '40 132' ] && [ $i -lt 60 ]; do sleep 0.05; i=$((i+1)); done; stty size"
    stream = await rig.runtime.exec(container_id, ["sh", "-c", script], tty=True, stdin=True)
    await asyncio.sleep(0.2)
    await stream.resize(132, 40)
    output = b""
    async with asyncio.timeout(20):
        async for channel, data in stream.read():
            assert channel == 1
            output += data
        assert await stream.wait() == 0
    await stream.close()
    assert output == b"40 132\r\n"


async def test_attach_sees_and_feeds_the_first_process(rig: Rig) -> None:
    _, container_id = await rig.run("sh", "-c", "while read line; do echo got $line; done; echo end", stdin=True, stdin_once=True)
    stream = await rig.runtime.attach(container_id, tty=False, stdin=True)
    await stream.write_stdin(b"one\ntwo\n")
    await asyncio.sleep(0.3)
    await stream.close_stdin()
    output = b""
    async with asyncio.timeout(20):
        async for _, data in stream.read():
            output += data
    await stream.close()
    assert output == b"got one\ngot two\nend\n"


async def test_a_port_is_forwarded(rig: Rig) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sandbox_id, _ = await rig.run("nc", "-ll", "-p", str(port), "-e", "cat")
    answer = b""
    async with asyncio.timeout(10):
        while answer != b"hello":
            await asyncio.sleep(0.1)
            with contextlib.suppress(RuntimeFault):  # it does not listen yet
                connection = await rig.runtime.port_forward(sandbox_id, port)
                await connection.write(b"hello")
                with contextlib.suppress(RuntimeFault):
                    answer = await connection.read()
                await connection.close()


async def test_events_tell_the_life_of_a_container(rig: Rig) -> None:
    events = rig.runtime.events()
    _, container_id = await rig.run("sleep", "0.2")
    await rig.ended(container_id)
    if not isinstance(rig.runtime, GRPCRuntime):
        await rig.runtime.remove_container(container_id)
    seen = []
    async with asyncio.timeout(10):
        async for event in events:
            if event.container_id == container_id:
                seen.append(event.type)
                if event.type == "STOPPED":
                    break
    assert seen == ["CREATED", "STARTED", "STOPPED"]


async def test_security_settings_reach_the_process(rig: Rig) -> None:
    security = ContainerSecurity(run_as_user=1000, run_as_group=77, supplemental_groups=[5], no_new_privs=True, drop_capabilities=["ALL"])
    _, log = await rig.output("sh", "-c", "id -u; id -g; id -G; grep -E 'CapBnd|NoNewPrivs' /proc/self/status", security=security)
    lines = log.split()
    assert lines[:2] == ["1000", "77"]
    assert {"77", "5"} <= set(lines[2 : lines.index("CapBnd:")])
    assert int(lines[lines.index("CapBnd:") + 1], 16) == 0
    assert lines[lines.index("NoNewPrivs:") + 1] == "1"
    status, log = await rig.output("touch", "/x", security=ContainerSecurity(readonly_rootfs=True))
    assert status.exit_code == 1
    assert "Read-only" in log
    status, _ = await rig.output("unshare", "-U", "true", security=ContainerSecurity(seccomp=SeccompProfile("RuntimeDefault")))
    assert status.exit_code != 0


async def test_mounts_and_limits(rig: Rig) -> None:
    source = rig.folder / "mounted"
    source.mkdir()
    (source / "f").write_text("x")
    status, log = await rig.output("sh", "-c", "cat /m/f; sleep 0.1; touch /m/g", mounts=[Mount("/m", str(source), readonly=True)])
    assert status.exit_code == 1
    assert "x" in log
    status, _ = await rig.output("sh", "-c", "x=a; while :; do x=$x$x; done", resources=LinuxResources(memory_limit_bytes=24 << 20))
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


async def test_the_log_can_be_rotated(rig: Rig) -> None:
    _, container_id = await rig.run("sh", "-c", "i=0; while :; do echo line; sleep 0.02; done")
    path = Path((await rig.runtime.container_status(container_id)).log_path)
    await _grows(path)
    path.rename(path.with_suffix(".1"))
    await rig.runtime.reopen_container_log(container_id)
    await _grows(path)


async def _grows(path: Path) -> None:
    async with asyncio.timeout(5):
        while not path.exists() or path.stat().st_size == 0:
            await asyncio.sleep(0.02)


async def test_figures_are_there(rig: Rig) -> None:
    _, container_id = await rig.run("sleep", "1000")
    stats = [item for item in await rig.runtime.list_container_stats({"rig": rig.tag}) if item.id == container_id]
    assert stats[0].memory_working_set_bytes > 0
    assert stats[0].timestamp_ns > 0


async def test_images_are_listed_and_found_by_every_name(rig: Rig) -> None:
    image = await rig.images.image_status("busybox")
    assert image is not None
    assert BUSYBOX in image.repo_tags
    assert image.id in [item.id for item in await rig.images.list_images()]
    assert (await rig.images.image_status(image.id)) is not None
    assert await rig.images.image_status("no/such:image") is None
    assert (await rig.images.image_fs_info()).mountpoint


async def test_two_containers_of_a_pod_and_the_filters_of_the_list(rig: Rig) -> None:
    sandbox_id, first = await rig.run("sleep", "1000", name="a")
    second = await rig.runtime.create_container(sandbox_id, rig.container("sleep", "1000", name="b"))
    assert {item.id for item in await rig.runtime.list_containers(sandbox_id=sandbox_id)} == {first, second}
    assert [item.id for item in await rig.runtime.list_containers({"rig": rig.tag, "name": "b"})] == [second]
    states = {item.id: item.state for item in await rig.runtime.list_containers({"rig": rig.tag})}
    assert states == {first: ContainerState.RUNNING, second: ContainerState.CREATED}
