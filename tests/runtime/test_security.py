"""What a container may do and what it sees: users, capabilities, seccomp, paths, namespaces, mounts, limits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from knarr.runtime.cri import (
    ContainerSecurity,
    IDMapping,
    LinuxResources,
    Mount,
    NamespaceOptions,
    RuntimeFault,
    SeccompProfile,
)
from tests.runtime.conftest import BUSYBOX, Bench


async def test_user_and_groups_come_from_the_image_unless_given(bench: Bench) -> None:
    _, log = await bench.output("id", security=ContainerSecurity(run_as_username="test"))
    assert log == "uid=1000(test) gid=1000(test) groups=1000(test),2000(extra),3000(more)\n"
    _, log = await bench.output("id", name="d", security=ContainerSecurity(run_as_user=4711, run_as_group=815, supplemental_groups=[7, 8]))
    assert log == "uid=4711 gid=815 groups=7,8,815\n"


async def test_the_strict_policy_ignores_groups_of_the_image(bench: Bench) -> None:
    security = ContainerSecurity(run_as_user=1000, supplemental_groups=[9], supplemental_groups_policy="Strict")
    _, log = await bench.output("id", security=security)
    assert log == "uid=1000(test) gid=1000(test) groups=9,1000(test)\n"


async def test_an_unknown_user_name_fails_the_create(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    config = bench.container("id", security=ContainerSecurity(run_as_username="nobody-here"))
    with pytest.raises(RuntimeFault, match="no matching entries in passwd file"):
        await bench.runtime.create_container(sandbox_id, config)
    assert await bench.runtime.list_containers() == []
    assert list((bench.folder / "state/containers").iterdir()) == []


async def test_capabilities_are_the_default_list_added_to_and_dropped_from(bench: Bench) -> None:
    async def effective(**fields: object) -> int:
        _, log = await bench.output("grep", "CapEff", "/proc/self/status", security=ContainerSecurity(**fields))  # type: ignore[arg-type]
        return int(log.split()[1], 16)

    default = await effective()
    assert default == 0xA80425FB
    assert await effective(drop_capabilities=["ALL"]) == 0
    assert await effective(drop_capabilities=["ALL"], add_capabilities=["NET_ADMIN"]) == 1 << 12
    assert await effective(add_capabilities=["SYS_TIME"]) == default | 1 << 25
    assert await effective(privileged=True) > default | 1 << 21


async def test_setuid_works_unless_new_privileges_are_forbidden(bench: Bench) -> None:
    for forbidden, expected in ((False, "0"), (True, "1000")):
        config = ContainerSecurity(run_as_user=1000, no_new_privs=forbidden)
        _, log = await bench.output("/usr/bin/suid-bash", "-p", "-c", "echo $EUID", security=config, name=f"n{forbidden}")
        assert log.strip() == expected


async def test_seccomp_default_forbids_and_unconfined_allows(bench: Bench) -> None:
    sec = ContainerSecurity(seccomp=SeccompProfile("RuntimeDefault"))
    code, _ = await bench.output("unshare", "-U", "true", security=sec)
    assert code != 0
    code, log = await bench.output("grep", "Seccomp:", "/proc/self/status", security=sec, name="d")
    assert log.split()[1] == "2"
    code, log = await bench.output("grep", "Seccomp:", "/proc/self/status", name="e")
    assert log.split()[1] == "0"


async def test_a_localhost_profile_is_applied_and_a_missing_one_fails(bench: Bench) -> None:
    profile = bench.folder / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}))
    sec = ContainerSecurity(seccomp=SeccompProfile("Localhost", str(profile)))
    code, log = await bench.output("mkdir", "/tmp/x", security=sec)
    assert code == 1
    assert "Operation not permitted" in log
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    gone = bench.container("true", security=ContainerSecurity(seccomp=SeccompProfile("Localhost", "/nowhere.json")))
    with pytest.raises(RuntimeFault, match="cannot load seccomp profile"):
        await bench.runtime.create_container(sandbox_id, gone)


async def test_paths_are_masked_and_read_only_unless_unmasked(bench: Bench) -> None:
    script = "exec 2>/dev/null; cat /proc/timer_list | wc -c; echo x >/proc/sys/kernel/domainname && echo written; ls /sys/firmware | wc -l"
    _, log = await bench.output("sh", "-c", script)
    assert log == "0\n0\n"
    open_ = ContainerSecurity(masked_paths=[], readonly_paths=[])
    _, log = await bench.output("sh", "-c", script, security=open_, name="d")
    assert "written" in log


async def test_a_read_only_root_cannot_be_written(bench: Bench) -> None:
    code, log = await bench.output("touch", "/file", security=ContainerSecurity(readonly_rootfs=True))
    assert code == 1
    assert "Read-only file system" in log


async def test_mounts_read_only_recursive_and_propagated(bench: Bench) -> None:
    source = bench.folder / "data"
    source.mkdir()
    (source / "f").write_text("content")
    code, log = await bench.output("sh", "-c", "cat /data/f; touch /data/g", mounts=[Mount("/data", str(source), readonly=True)])
    assert code == 1
    assert log.startswith("content")
    code, log = await bench.output(
        "sh", "-c", "cat /data/f; touch /data/g", name="d", mounts=[Mount("/data", str(source), readonly=True, recursive_read_only=True)]
    )
    assert code == 1
    code, _ = await bench.output("touch", "/data/h", name="e", mounts=[Mount("/data", str(source))])
    assert code == 0
    assert (source / "h").exists()
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    config = bench.container("true", mounts=[Mount("/data", str(source), propagation="BIDIRECTIONAL")])
    with pytest.raises(RuntimeFault, match="is not a shared mount"):
        await bench.runtime.create_container(sandbox_id, config)


async def test_an_image_volume_is_mounted_read_only(bench: Bench) -> None:
    code, log = await bench.output("sh", "-c", "ls /img/bin/busybox; touch /img/x", mounts=[Mount("/img", image=BUSYBOX)])
    assert code == 1
    assert log.startswith("/img/bin/busybox\n")
    _, log = await bench.output("ls", "/img", name="d", mounts=[Mount("/img", image=BUSYBOX, image_sub_path="etc")])
    assert log == "group\npasswd\n"


async def test_resolv_conf_host_name_and_environment(bench: Bench) -> None:
    from knarr.runtime.cri import DNSConfig

    sandbox = bench.sandbox(dns=DNSConfig(["10.96.0.10"], ["default.svc.cluster.local"], ["ndots:5"]), hostname="web-0")
    sandbox_id = await bench.runtime.run_pod_sandbox(sandbox)
    _, log = await bench.output("sh", "-c", "cat /etc/resolv.conf /etc/hostname; echo $HOSTNAME $A $PATH", sandbox_id=sandbox_id, env=[("A", "b c")])
    assert log == (
        "search default.svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\nweb-0\n"
        "web-0 b c /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )


async def test_safe_sysctls_are_set_and_bad_ones_fail(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(sysctls={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "7"}))
    _, log = await bench.output("sysctl", "kernel.shm_rmid_forced", "net.ipv4.ip_unprivileged_port_start", sandbox_id=sandbox_id)
    assert log == "kernel.shm_rmid_forced = 1\nnet.ipv4.ip_unprivileged_port_start = 7\n"
    with pytest.raises(RuntimeFault, match="sysctl"):
        await bench.runtime.run_pod_sandbox(bench.sandbox(sysctls={"no.such.thing": "1"}))


async def test_host_namespaces_are_the_hosts(bench: Bench) -> None:
    options = NamespaceOptions(network="NODE", ipc="NODE", pid="NODE")
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options, hostname=""))
    _, log = await bench.output(
        "sh", "-c", "for k in net ipc pid; do readlink /proc/self/ns/$k; done", sandbox_id=sandbox_id, security=ContainerSecurity(namespaces=options)
    )
    assert log.split() == [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "ipc", "pid")]


async def test_a_pod_with_a_shared_pid_namespace_has_a_pause_process(bench: Bench) -> None:
    options = NamespaceOptions(pid="POD")
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options))
    security = ContainerSecurity(namespaces=options)
    first = await bench.run("sleep", "1000", sandbox_id=sandbox_id, security=security, name="a")
    _, log = await bench.output("ps", "-o", "pid,args", sandbox_id=sandbox_id, security=security, name="b")
    lines = [line.split(None, 1) for line in log.splitlines()[1:]]
    assert lines[0] == ["1", "/pause"]
    assert "sleep 1000" in [line[1] for line in lines]
    # Orphans are reaped, and the end of one container does not end the namespace.
    await bench.output("sh", "-c", "(sleep 0.05 &) ; true", sandbox_id=sandbox_id, security=security, name="c")
    await bench.runtime.stop_container(first, 0)
    code, log = await bench.output("ps", "-o", "stat,args", sandbox_id=sandbox_id, security=security, name="d")
    assert code == 0
    assert not [line for line in log.splitlines() if line.startswith("Z")]


async def test_a_debug_container_joins_the_processes_of_its_target(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    target = await bench.run("sleep", "1234", sandbox_id=sandbox_id, name="a")
    options = NamespaceOptions(pid="TARGET", target_id=target)
    _, log = await bench.output("ps", "-o", "args", sandbox_id=sandbox_id, security=ContainerSecurity(namespaces=options), name="debug")
    assert "sleep 1234" in log


# The kernel refuses user namespaces to whom is in a chroot, and administrators may forbid them.
USER_NAMESPACES = subprocess.run(["unshare", "--user", "true"], check=False, capture_output=True).returncode == 0


async def refused(bench: Bench, options: NamespaceOptions) -> None:
    """Where the kernel allows no user namespaces, the sandbox is refused in one line and leaves nothing."""
    with pytest.raises(RuntimeFault, match="the kernel does not allow user namespaces here"):
        await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options))
    assert await bench.runtime.list_pod_sandboxes() == []


async def test_a_user_namespace_maps_root_to_nobody_on_the_host(bench: Bench) -> None:
    options = NamespaceOptions(user_mappings=[IDMapping(200000, 0, 65536)])
    if not USER_NAMESPACES:
        return await refused(bench, options)
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options))
    container_id = await bench.run(
        "sh", "-c", "id -u; cat /proc/self/uid_map; ls -ln /bin/busybox | cut -c1-30; touch /made && ls -ln /made; hostname; sleep 1000",
        sandbox_id=sandbox_id, security=ContainerSecurity(namespaces=options),
    )  # fmt: skip
    status = await bench.runtime.container_status(container_id)
    path = Path(status.log_path)
    for _ in range(200):
        if "pod\n" in path.read_text():
            break
        import asyncio

        await asyncio.sleep(0.02)
    log = bench.log(status)
    assert log.splitlines()[0] == "0"
    assert log.splitlines()[1].split() == ["0", "200000", "65536"]
    assert " 0        0 " in log
    assert os.stat(f"/proc/{status.pid}").st_uid == 200000
    result = await bench.runtime.exec_sync(container_id, ["id", "-u"])
    assert result.stdout == b"0\n"


async def test_a_user_namespace_with_a_shared_pid_namespace(bench: Bench) -> None:
    options = NamespaceOptions(pid="POD", user_mappings=[IDMapping(200000, 0, 65536)])
    if not USER_NAMESPACES:
        return await refused(bench, options)
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options))
    _, log = await bench.output("ps", "-o", "pid,args", sandbox_id=sandbox_id, security=ContainerSecurity(namespaces=options))
    assert log.splitlines()[1].split() == ["1", "/pause"]


async def test_a_memory_limit_kills_with_the_reason(bench: Bench) -> None:
    script = "x=a; while :; do x=$x$x; done"
    code, _ = await bench.output("sh", "-c", script, resources=LinuxResources(memory_limit_bytes=24 << 20))
    status = (await bench.runtime.list_containers())[0]
    assert (code, status.reason) == (137, "OOMKilled")


async def test_a_killed_child_gives_the_reason_whatever_the_exit_code(bench: Bench) -> None:
    for code in (4, 0):
        script = f"sh -c 'x=a; while :; do x=$x$x; done'; exit {code}"
        found, _ = await bench.output("sh", "-c", script, name=f"c{code}", resources=LinuxResources(memory_limit_bytes=24 << 20))
        status = next(item for item in await bench.runtime.list_containers() if item.metadata.name == f"c{code}")
        assert (found, status.reason) == (code, "OOMKilled")


async def test_a_fork_bomb_is_contained_by_the_pids_limit(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "b() { b | b & }; b; sleep 1000", resources=LinuxResources(pids_limit=40, memory_limit_bytes=256 << 20))
    import asyncio

    await asyncio.sleep(1)
    stats = (await bench.runtime.list_container_stats())[0]
    assert stats.process_count <= 40
    await bench.runtime.stop_container(container_id, 0)


# On version 1 /sys/fs/cgroup itself is a file system of the container alone, and no group.
ESCAPES = r"""
try() { ( eval "$1" ) >/dev/null 2>&1 && echo "worked: $1"; }
for f in core_pattern modprobe hotplug; do [ -e /proc/sys/kernel/$f ] && try "echo '|/evil' >/proc/sys/kernel/$f"; done
try 'echo b >/proc/sysrq-trigger'
try 'echo 1 >/proc/sys/vm/drop_caches'
try 'echo /evil >/sys/kernel/uevent_helper'
try 'echo 1 >/sys/fs/cgroup/memory/notify_on_release'
try 'mkdir /sys/fs/cgroup/pids/mine'
try 'echo max >/sys/fs/cgroup/pids/pids.max'
try '[ -e /sys/fs/cgroup/cgroup.procs ] && mkdir /sys/fs/cgroup/mine'
try '[ -e /sys/fs/cgroup/pids.max ] && echo max >/sys/fs/cgroup/pids.max'
mkdir -p /tmp/c
for kind in "cgroup -o memory" "cgroup -o rdma" cgroup2 proc sysfs tmpfs devtmpfs; do try "mount -t ${kind%% *} none ${kind#${kind%% *}} /tmp/c"; done
try 'mount -o remount,rw /sys'
try 'mount -o remount,rw /proc/sys'
try 'umount /proc/sys'
try 'umount /proc/kcore'
try 'head -c 1 /proc/kcore'
try 'nsenter -t 1 -m true'
try 'chroot /proc/1/root/../../.. ls /var/lib/knarr'
try 'mknod /tmp/disk b 7 0 && head -c 1 /tmp/disk'
try 'ls /proc/1/root/proc/1/cwd/../../../../run/knarr'
try 'date -s 2001-01-01 && [ $(date +%Y) = 2001 ]'
try 'hostname other'
try 'insmod /evil'
find / -name release_agent 2>/dev/null | while read f; do try "echo /evil >$f"; done
echo done
"""


async def test_no_way_out_of_an_unprivileged_container(bench: Bench) -> None:
    core_pattern = Path("/proc/sys/kernel/core_pattern")
    before = core_pattern.read_text()
    _, log = await bench.output("sh", "-c", ESCAPES, resources=LinuxResources(pids_limit=100))
    assert log == "done\n"
    # A user namespace of its own gives it back all capabilities, but none over what is the host's.
    inside = "unshare -Umr sh -c 'mkdir -p /tmp/c; mount -t cgroup -o rdma none /tmp/c && echo worked; echo x >/proc/sys/kernel/core_pattern && echo worked'; true"
    _, log = await bench.output("sh", "-c", inside, name="d")
    assert "worked" not in log
    assert core_pattern.read_text() == before


async def test_a_privileged_container_cannot_lift_the_limits_of_its_pod_by_its_own_groups(bench: Bench) -> None:
    script = "find /sys/fs/cgroup -name 'pod*' -o -name kubepods | wc -l; for f in /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max; do [ -e $f ] && echo max >$f && cat $f; done; true"
    _, log = await bench.output("sh", "-c", script, security=ContainerSecurity(privileged=True), resources=LinuxResources(pids_limit=30))
    assert log.splitlines()[0] == "0", "the groups above its own are not in its sight"


async def test_a_working_directory_through_the_runtimes_descriptors_is_not_the_hosts(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    for number in range(3, 13):
        config = bench.container("sh", "-c", "ls -d ../../../../../../../../..//var/lib/dpkg && echo worked; true", name=f"c{number}", working_dir=f"/proc/self/fd/{number}")
        container_id = await bench.runtime.create_container(sandbox_id, config)
        try:
            await bench.runtime.start_container(container_id)
        except RuntimeFault:
            continue
        assert "worked" not in bench.log(await bench.ended(container_id))


async def test_limits_can_be_changed_while_it_runs(bench: Bench) -> None:
    container_id = await bench.run("sleep", "1000", resources=LinuxResources(memory_limit_bytes=64 << 20, cpu_shares=100))
    await bench.runtime.update_container_resources(container_id, LinuxResources(memory_limit_bytes=128 << 20, cpu_shares=512, cpu_quota_us=20000, cpu_period_us=100000))
    status = await bench.runtime.container_status(container_id)
    assert status.resources is not None
    assert status.resources.memory_limit_bytes == 128 << 20
    groups = Path("/sys/fs/cgroup")
    found = list(groups.glob(f"memory/{bench.group[1:]}/**/{container_id}/memory.limit_in_bytes")) + list(groups.glob(f"{bench.group[1:]}/**/{container_id}/memory.max"))
    assert found[0].read_text().strip() == str(128 << 20)


async def test_no_command_anywhere_is_an_error(bench: Bench) -> None:
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    with pytest.raises(RuntimeFault, match="unknown capability"):
        await bench.runtime.create_container(sandbox_id, bench.container("true", security=ContainerSecurity(add_capabilities=["FLY"])))


async def test_volumes_of_a_user_namespace_show_its_owners(bench: Bench) -> None:
    source = bench.folder / "volume"
    source.mkdir()
    (source / "f").write_text("x")
    single = bench.folder / "single"
    single.write_text("y")
    options = NamespaceOptions(user_mappings=[IDMapping(300000, 0, 65536)])
    if not USER_NAMESPACES:
        return await refused(bench, options)
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox(namespaces=options))
    _, log = await bench.output(
        "sh", "-c", "stat -c %u /v/f /s; touch /v/made; stat -c %u /v/made; echo z >> /s", sandbox_id=sandbox_id,
        security=ContainerSecurity(namespaces=options), mounts=[Mount("/v", str(source)), Mount("/s", str(single))],
    )  # fmt: skip
    assert log == "0\n0\n0\n"
    assert (source / "made").stat().st_uid == 0
    assert single.read_text() == "yz\n"


async def test_cdi_devices_edit_the_specification(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from knarr.runtime import cdi

    folder = bench.folder / "cdi"
    folder.mkdir()
    spec = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/thing",
        "containerEdits": {"env": ["ALL=1"]},
        "devices": [
            {
                "name": "one",
                "containerEdits": {
                    "env": ["ONE=1"],
                    "deviceNodes": [{"path": "/dev/thing", "hostPath": "/dev/null"}],
                    "mounts": [{"hostPath": str(folder), "containerPath": "/cdi", "options": ["ro", "rbind"]}],
                },
            }
        ],
    }
    (folder / "vendor.json").write_text(json.dumps(spec))
    (folder / "broken.yaml").write_text("{")
    monkeypatch.setattr(cdi.apply, "__defaults__", ([str(folder)],))
    _, log = await bench.output("sh", "-c", "echo $ALL $ONE; ls /cdi; echo x > /dev/thing && echo written", cdi_devices=["vendor.com/thing=one"])
    assert log == "1 1\nbroken.yaml\nvendor.json\nwritten\n"
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    with pytest.raises(RuntimeFault, match="unresolvable CDI devices vendor"):
        await bench.runtime.create_container(sandbox_id, bench.container("true", annotations={"cdi.k8s.io/x": "vendor.com/thing=two"}))
