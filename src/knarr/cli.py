"""The `knarr` command: one parser, one error boundary; the work is in `knarr.cluster`.

Role: parse, call, print, exit code. Imports stay inside the functions, because most commands need few of them and a shell
prompt waits for this module. Errors that a user can act on become one line on stderr and exit code 1; usage errors exit 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parse(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:  # the one boundary: known classes become one line, anything else is a bug with a traceback
        if not _is_expected(error):
            raise
        print(f"knarr: {error}", file=sys.stderr)
        return 1
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; words behind an option belong to the words before it (`why can-i --as jane create pods`), which argparse leaves over."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    words: list[str] | None = getattr(options, "words", None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words += rest
    return options


def _is_expected(error: Exception) -> bool:
    from knarr.api.errors import StatusError
    from knarr.cluster.config import ConfigError
    from knarr.cluster.lifecycle import CommandError
    from knarr.runtime.cri import RuntimeFault

    return isinstance(error, (CommandError, ConfigError, StatusError, RuntimeFault, PermissionError, ConnectionError))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every leaf carries its function as `run`."""
    parser = argparse.ArgumentParser(prog="knarr", description="Kubernetes in Python: a real cluster in about a second")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.add_argument("--name", default=os.environ.get("KNARR_NAME", "default"), help="which cluster (default: $KNARR_NAME, or default)")
        command.add_argument("--data-dir", default=None, help="where its state is kept (default: /var/lib/knarr/NAME)")
        command.set_defaults(run=run)
        return command

    up = verb("up", run_up, "bring the cluster up")
    up.add_argument("--nodes", type=int, default=None, help="number of nodes on this machine, for a new cluster")
    up.add_argument("--storage", default=None, help="store address, for a new cluster (default: an embedded file)")
    up.add_argument("--oci-runtime", default=None, metavar="runc|crun|unix:///SOCKET", help="program that makes containers, or the socket of containerd or CRI-O")
    up.add_argument("--container-runtime-endpoint", dest="oci_runtime", metavar="unix:///SOCKET", help="the same as --oci-runtime with a socket, by the kubelet's name for it")
    up.add_argument("--apiserver-arg", action="append", default=[], metavar="NAME=VALUE", help="option of kube-apiserver, e.g. oidc-issuer-url=URL")
    up.add_argument("--controllers", default=None, help="controllers to run, e.g. *,-deployment")
    up.add_argument("--tls-san", action="append", default=[], metavar="NAME|ADDRESS", help="further name of the API server for its certificate, e.g. one that other machines join by")
    up.add_argument("--controller-manager-arg", action="append", default=[], metavar="NAME=VALUE", help="option of kube-controller-manager, e.g. node-monitor-grace-period=40s")
    _add_credential_providers(up)
    up.add_argument("--kubelet-config", default=None, metavar="FILE", help="KubeletConfiguration for the nodes of this machine; an empty name takes it back")
    up.add_argument("--scheduler-config", default=None, metavar="FILE", help="KubeSchedulerConfiguration: profiles, plugins, extenders; an empty name takes it back")
    _add_network(up)
    up.add_argument("--no-kubeconfig", action="store_true", help="leave the user's kubeconfig alone")
    verb("down", run_down, "stop the cluster; its data stays")
    verb("delete", run_delete, "stop the cluster and remove its data")
    verb("status", run_status, "show the components and nodes").add_argument("-o", "--output", choices=["text", "json"], default="text")
    logs = verb("logs", run_logs, "print the log of a component")
    logs.add_argument("component")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--tail", type=int, default=-1, help="only the last N lines")
    verb("kubeconfig", run_kubeconfig, "merge the cluster's context into the kubeconfig again")
    verb("preflight", run_preflight, "check what the cluster needs of this machine")
    verb("version", run_version, "print the version")
    verb("backup", run_backup, "write all API objects to a file").add_argument("file")
    verb("restore", run_restore, "put a backup in the place of the store of a cluster that is down").add_argument("file")
    _add_why(verb("why", run_why, "say why something waits, is refused or does not arrive: knarr why pod/NAME, svc/NAME, pvc/NAME, ns/NAME, deploy/NAME, can-i …"))
    simulation = verb("simulate", run_simulate, "simulate nodes and pods: knarr simulate nodes=1000 pods=5000; without arguments, say what is simulated")
    simulation.add_argument("settings", nargs="*", metavar="nodes=N|pods=N|stages=FILE")
    simulation.add_argument("--taint", action=argparse.BooleanOptionalAction, default=None, help="keep pods off simulated nodes that do not tolerate them (default: yes)")
    _add_port(verbs)
    _add_image(verbs)
    _add_node(verbs)
    _add_token(verbs)
    _add_join(verb("join", run_join, "make this machine a node of a cluster that runs elsewhere"))
    return parser


def _add_why(question: argparse.ArgumentParser) -> None:
    question.add_argument(
        "words", nargs="+", metavar="QUESTION",
        help="pod, svc, pvc, ns, deploy, sts, ds, rs, job or node/NAME, KIND/NAMESPACE/NAME; target of a packet: pod/NAME:PORT, svc/NAME:PORT, "
        "NAME.NAMESPACE:PORT or ADDRESS:PORT; can-i: VERB RESOURCE|PATH [NAME]",
    )  # fmt: skip
    question.add_argument("-n", "--namespace", default="default")
    question.add_argument("--protocol", default="TCP", choices=["TCP", "UDP", "SCTP", "tcp", "udp", "sctp"])
    question.add_argument("--as", dest="user", default="", metavar="USER", help="can-i: whom to ask for, e.g. system:serviceaccount:default:default")
    question.add_argument("--as-group", dest="groups", action="append", default=[], metavar="GROUP", help="can-i: a group of that user")


def _add_network(up: argparse.ArgumentParser) -> None:
    up.add_argument("--service-cidr", default=None, metavar="CIDR[,CIDR]", help="addresses of Services, for a new cluster; with an IPv6 range behind a comma for two families")
    up.add_argument("--pod-cidr", default=None, metavar="CIDR[,CIDR]", help="addresses of pods, for a new cluster; two as with --service-cidr")
    up.add_argument("--node-port-range", default=None, metavar="FIRST-LAST", help="ports for NodePort Services, for a new cluster")
    up.add_argument("--load-balancer-pool", default=None, metavar="CIDR|FIRST-LAST[,…]", help="addresses for LoadBalancer Services")
    up.add_argument(
        "--announce", nargs="?", const="auto", default=None, metavar="INTERFACE",
        help="answer ARP and NDP for LoadBalancer addresses, so that the local network reaches them; --announce=off takes it back",
    )  # fmt: skip
    up.add_argument(
        "--pod-network", choices=["auto", "cni"], default=None,
        help="who makes the pods' network: auto is the built-in one unless there is a CNI configuration; with cni nodes wait for one, as Flannel's manifest brings it",
    )  # fmt: skip
    up.add_argument("--direct-path", action=argparse.BooleanOptionalAction, default=None, help="lead packets between pods past the IP stack of their node, where nothing there has to see them (default: yes)")
    up.add_argument("--cni-conf-dir", default=None, metavar="FOLDER", help="where a CNI configuration is looked for, which then replaces the built-in pod network (default: /etc/cni/net.d)")
    up.add_argument("--cni-bin-dir", default=None, metavar="FOLDER[,FOLDER]", help="where its plugins are (default: /opt/cni/bin,/usr/lib/cni)")
    up.add_argument("--dns-upstream", default=None, metavar="SERVER[,SERVER]", help="servers for names outside the cluster (default: those of this machine, as they change); an empty text takes it back")
    up.add_argument("--dns-stub-domain", action="append", default=[], metavar="DOMAIN=SERVER[,SERVER]", help="servers for the names of one domain")
    up.add_argument("--dns-autopath", action=argparse.BooleanOptionalAction, default=None, help="walk through search paths in the DNS server instead of the pods")


def _add_credential_providers(parser: argparse.ArgumentParser) -> None:
    name = "--image-credential-provider"
    parser.add_argument(f"{name}-config", default=None, metavar="FILE|FOLDER", help="plugins that give nodes credentials for images; an empty name takes it back")
    parser.add_argument(f"{name}-bin-dir", default=None, metavar="FOLDER", help="where their programs are")


def _add_join(join: argparse.ArgumentParser) -> None:
    join.add_argument("server", metavar="HOST:PORT", help="the API server")
    join.add_argument("--token", required=True, help="what `knarr token create` printed")
    join.add_argument("--discovery-token-ca-cert-hash", action="append", default=[], metavar="sha256:HEX", help="the authority that is believed")
    join.add_argument("--discovery-token-unsafe-skip-ca-verification", action="store_true", help="believe any authority that knows the token")
    join.add_argument("--node-name", default="", help="the node's name (default: this machine's host name)")
    _add_credential_providers(join)
    join.add_argument("--kubelet-config", default=None, metavar="FILE", help="KubeletConfiguration for this node")
    join.add_argument("--oci-runtime", default="runc", metavar="runc|crun|unix:///SOCKET", help="program that makes containers, or the socket of containerd or CRI-O")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=os.environ.get("KNARR_NAME", "default"), help="which cluster (default: $KNARR_NAME, or default)")
    parser.add_argument("--data-dir", default=None, help="where its state is kept")


def _add_token(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    token = verbs.add_parser("token", help="tokens with which other machines join")
    actions = token.add_subparsers(metavar="ACTION", required=True)
    for name, text in (("create", "make a token and print the command that joins with it"), ("ls", "list tokens"), ("rm", "delete a token")):
        action = actions.add_parser(name, help=text, description=text)
        _add_cluster(action)
        action.set_defaults(run=run_token, action=name)
        if name == "create":
            action.add_argument("--ttl", default="24h", help="how long it lasts; 0 never ends (default: 24h)")
        if name == "rm":
            action.add_argument("token")


def _add_port(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    port = verbs.add_parser("port", help="services on ports of this machine")
    actions = port.add_subparsers(metavar="ACTION", required=True)
    for name, text in (("add", "publish a service: knarr port add 8080:web:80"), ("rm", "take a port back"), ("ls", "list published ports")):
        action = actions.add_parser(name, help=text, description=text)
        _add_cluster(action)
        action.set_defaults(run=run_port, action=name)
        if name == "add":
            action.add_argument("mapping", metavar="HOSTPORT:SERVICE:PORT")
            action.add_argument("-n", "--namespace", default="default")
        if name == "rm":
            action.add_argument("host_port", type=int, metavar="HOSTPORT")


def _add_node(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    node = verbs.add_parser("node", help="further nodes on this machine")
    actions = node.add_subparsers(metavar="ACTION", required=True)
    texts = {
        "ls": "list the nodes of this machine",
        "add": "add a node and start it",
        "stop": "switch a node off",
        "kill": "switch a node off as if the power had failed",
        "start": "switch a node on again",
        "rm": "take a node out of the cluster",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        _add_cluster(action)
        action.set_defaults(run=run_node, action=name)
        if name != "ls":
            action.add_argument("node", nargs="?" if name == "add" else None, help="the node's name")
        if name == "add":
            action.add_argument("--taint", action="append", default=[], metavar="KEY[=VALUE]:EFFECT")
            action.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")


def _add_image(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    image = verbs.add_parser("image", help="images on the nodes of this machine")
    actions = image.add_subparsers(metavar="ACTION", required=True)
    for name, text in (("load", "load images from OCI or docker archives"), ("pull", "pull an image from its registry"), ("ls", "list images"), ("rm", "remove an image")):
        action = actions.add_parser(name, help=text, description=text)
        _add_cluster(action)
        action.set_defaults(run=run_image, action=name)
        if name == "load":
            action.add_argument("archives", nargs="+", help="files, or - for standard input")
        if name in ("pull", "rm"):
            action.add_argument("references", nargs="+", metavar="IMAGE")
        if name == "pull":
            action.add_argument("--creds", default="", metavar="USER:PASSWORD", help="credentials for the registry")


def run_up(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, netoptions
    from knarr.cluster.progress import Progress

    progress = Progress()
    if options.nodes is not None and not 1 <= options.nodes <= 50:
        raise lifecycle.CommandError(f"--nodes must be between 1 and 50, not {options.nodes}")
    try:
        config = lifecycle.up(
            lifecycle.UpOptions(
                name=options.name,
                data_dir=options.data_dir,
                nodes=options.nodes,
                storage=options.storage,
                oci_runtime=options.oci_runtime,
                controllers=options.controllers,
                apiserver_arguments=tuple(options.apiserver_arg),
                tls_names=tuple(options.tls_san),
                kubelet_config=options.kubelet_config,
                credential_providers=(options.image_credential_provider_config, options.image_credential_provider_bin_dir),
                controller_arguments=tuple(options.controller_manager_arg),
                scheduler_config=options.scheduler_config,
                kubeconfig=not options.no_kubeconfig,
                network=netoptions.read(options),
            ),
            progress,
        )
    finally:
        progress.clear()
    print(f"node {config.nodes[0].name} is part of the cluster" if config.joined else f"ready: kubectl --context {config.context} get nodes", file=sys.stderr)
    return 0


def run_join(options: argparse.Namespace) -> int:
    from knarr.cluster import join
    from knarr.cluster.progress import Progress

    progress = Progress()
    try:
        config = join.join(
            join.JoinOptions(
                server=options.server,
                token=options.token,
                hashes=tuple(options.discovery_token_ca_cert_hash),
                any_authority=options.discovery_token_unsafe_skip_ca_verification,
                node_name=options.node_name,
                name=options.name,
                data_dir=options.data_dir,
                oci_runtime=options.oci_runtime,
                kubelet_config=options.kubelet_config,
                credential_providers=(options.image_credential_provider_config, options.image_credential_provider_bin_dir),
            ),
            progress,
        )
    finally:
        progress.clear()
    print(f"node {config.nodes[0].name} is part of the cluster", file=sys.stderr)
    return 0


def run_token(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, tokens

    config = lifecycle.existing(options.name, options.data_dir)
    if options.action == "create":
        return tokens.create(config, options.ttl)
    if options.action == "rm":
        return tokens.remove(config, options.token)
    return tokens.show(config)


def run_down(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle
    from knarr.cluster.progress import Progress

    lifecycle.down(lifecycle.existing(options.name, options.data_dir), Progress())
    return 0


def run_delete(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle
    from knarr.cluster.progress import Progress

    lifecycle.delete(lifecycle.existing(options.name, options.data_dir), Progress())
    return 0


def run_status(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, report

    config = lifecycle.existing(options.name, options.data_dir)
    return report.print_status(config, lifecycle.status(config), as_json=options.output == "json")


def run_logs(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, report

    config = lifecycle.existing(options.name, options.data_dir)
    return report.print_log(lifecycle.log_path(config, options.component), tail=options.tail, follow=options.follow)


def run_kubeconfig(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle

    config = lifecycle.existing(options.name, options.data_dir)
    path = lifecycle.merge_kubeconfig(config, lifecycle.make_pki(config))
    print(f"context {config.context} is in {path}", file=sys.stderr)
    return 0


def run_backup(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knarr.cluster import backup, lifecycle

    summary = backup.backup(lifecycle.existing(options.name, options.data_dir), Path(options.file))
    print(f"{summary.keys} objects at revision {summary.revision} are in {options.file}", file=sys.stderr)
    return 0


def run_restore(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knarr.cluster import backup, lifecycle

    summary = backup.restore(lifecycle.existing(options.name, options.data_dir), Path(options.file))
    print(f"{summary.keys} objects restored, the store is at revision {summary.revision}", file=sys.stderr)
    return 0


def run_preflight(options: argparse.Namespace) -> int:
    from knarr.cluster import config as cluster_config
    from knarr.cluster import preflight

    config = cluster_config.load(options.name, options.data_dir) or cluster_config.new_cluster(options.name, options.data_dir)
    findings = preflight.check(config)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def run_version(options: argparse.Namespace) -> int:
    from importlib.metadata import version

    print(f"knarr {version('knarr')}")
    return 0


def run_why(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, netverbs, whyverbs

    config = lifecycle.existing(options.name, options.data_dir)
    first, *rest = options.words
    if first == "can-i":
        return whyverbs.explain_request(config, rest, options.namespace, options.user, options.groups)
    if len(rest) > 1:
        raise lifecycle.CommandError("one target at most: knarr why pod/a pod/b:80")
    if not rest:
        return whyverbs.explain_object(config, first, options.namespace)
    return netverbs.explain(config, first, rest[0], namespace=options.namespace, protocol=options.protocol)


def run_simulate(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, simverbs
    from knarr.cluster.progress import Progress

    config, progress = lifecycle.existing(options.name, options.data_dir), Progress()
    try:
        return simverbs.simulate(config, options.settings, tainted=options.taint, progress=progress)
    finally:
        progress.clear()


def run_port(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, netverbs

    config = lifecycle.existing(options.name, options.data_dir)
    if options.action == "add":
        return netverbs.add_port(config, options.mapping, namespace=options.namespace)
    if options.action == "rm":
        return netverbs.remove_port(config, options.host_port)
    return netverbs.show_ports(config)


def run_image(options: argparse.Namespace) -> int:
    from knarr.cluster import images, lifecycle

    config = lifecycle.existing(options.name, options.data_dir)
    if options.action == "load":
        return images.load(config, options.archives)
    if options.action == "pull":
        return images.pull(config, options.references, options.creds)
    if options.action == "rm":
        return images.remove(config, options.references)
    return images.show(config)


def run_node(options: argparse.Namespace) -> int:
    from knarr.cluster import lifecycle, nodeverbs
    from knarr.cluster.progress import Progress

    config, progress = lifecycle.existing(options.name, options.data_dir), Progress()
    if options.action == "ls":
        return nodeverbs.show(config)
    if options.action == "add":
        return nodeverbs.add(config, options.node, options.taint, options.label, progress)
    if options.action in ("stop", "kill"):
        return nodeverbs.stop(config, options.node, kill=options.action == "kill", progress=progress)
    if options.action == "start":
        return nodeverbs.start(config, options.node, progress)
    return nodeverbs.remove(config, options.node, progress)


if __name__ == "__main__":
    sys.exit(main())
