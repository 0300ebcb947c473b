"""Lifecycle hooks: postStart and preStop by exec, HTTP or sleep. Caller: pod_sync. Source: pkg/kubelet/lifecycle/handlers.go."""

from __future__ import annotations

import asyncio

from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.node import Node
from knarr.kubelet.probes import actions
from knarr.runtime.cri import RuntimeFault, RuntimeService

_HTTP_TIMEOUT_SECONDS = 30.0


class HookError(Exception):
    """The hook failed; the text becomes the container's state message."""


async def run_hook(node: Node, pod: Object, container: Object, container_id: str, hook: Object, pod_ip: str) -> None:
    """Run one hook to its end; cancelling it gives it up.

    Raises:
      HookError: it failed.
    """
    if hook.get("exec"):
        await _exec(node.runtime, pod, container, container_id, hook["exec"].get("command") or [])
    elif hook.get("httpGet"):
        await _http(node, pod, container, hook["httpGet"], pod_ip)
    elif hook.get("sleep"):
        try:
            await asyncio.sleep(hook["sleep"].get("seconds") or 0)
        except asyncio.CancelledError:
            node.count("kubelet_sleep_action_terminated_early_total")
            raise


async def _exec(runtime: RuntimeService, pod: Object, container: Object, container_id: str, command: list[str]) -> None:
    where = f'for Container "{container["name"]}" in Pod "{podutil.full_name(pod)}" failed'
    try:
        result = await runtime.exec_sync(container_id, command, 0)
    except RuntimeFault as e:
        raise HookError(f"Exec lifecycle hook ([{' '.join(command)}]) {where} - error: {e}, message: \"\"") from e
    if result.exit_code != 0:
        output = (result.stdout + result.stderr).decode(errors="replace")
        error = f"command '{' '.join(command)}' exited with {result.exit_code}: {output}"
        raise HookError(f"Exec lifecycle hook ([{' '.join(command)}]) {where} - error: {error}, message: {output!r}")


async def _http(node: Node, pod: Object, container: Object, source: Object, pod_ip: str) -> None:
    try:
        port = actions.resolve_port(container, source.get("port") or 80)
    except actions.UnknownPort as e:
        raise HookError(str(e)) from e
    host = source.get("host") or pod_ip
    if not host:
        raise HookError(f'failed to find networking container: pod "{podutil.full_name(pod)}" has no IP')
    scheme = (source.get("scheme") or "HTTP").lower()
    headers = actions.http_headers(source)
    path = source.get("path") or "/"
    outcome = await actions.http_get(scheme, host, port, path, headers, _HTTP_TIMEOUT_SECONDS, follow=True)
    if outcome.output.endswith(actions.PLAIN_ANSWER):
        # Its port speaks plain HTTP, whatever the hook says.
        plain = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        outcome = await actions.http_get("http", host, port, path, plain, _HTTP_TIMEOUT_SECONDS, follow=True)
        if outcome.success or outcome.output.startswith("HTTP probe failed with statuscode"):
            node.count("kubelet_lifecycle_handler_http_fallbacks_total")
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            node.event(pod, "Warning", "LifecycleHTTPFallback", f"request to HTTPS lifecycle hook {where} got HTTP response, retry with HTTP succeeded")
    if not outcome.success and not outcome.output.startswith("HTTP probe failed with statuscode"):
        # An answer is an answer: only a request that got none has failed.
        raise HookError(
            f'HTTP lifecycle hook ({source.get("path") or ""}) for Container "{container["name"]}" in Pod "{podutil.full_name(pod)}" failed - error: {outcome.output}'
        )
