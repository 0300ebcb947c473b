"""What a running node does for `knarr image`: load, pull, list and remove images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knarr.cluster.localapi import Answer, Say

if TYPE_CHECKING:
    from knarr.runtime.embedded import EmbeddedRuntime
    from knarr.runtime.grpc_cri import GRPCRuntime


def image_verbs(runtime: EmbeddedRuntime | GRPCRuntime) -> Answer:
    """The verbs of one node's runtime; those of another runtime belong to its own tools."""
    if not hasattr(runtime, "load_images"):
        return _refuse

    async def answer(verb: str, arguments: dict[str, Any], say: Say) -> None:
        from knarr.runtime.cri import AuthConfig

        if verb == "images/list":
            for image in await runtime.list_images():
                say(id=image.id, tags=image.repo_tags, digests=image.repo_digests, size=image.size_bytes)
        elif verb == "images/load":
            for image in await runtime.load_images(arguments["path"]):
                say(loaded=image.repo_tags or [image.id])
        elif verb == "images/remove":
            if await runtime.image_status(arguments["image"]) is None:
                raise ValueError(f"there is no image {arguments['image']!r}")
            await runtime.remove_image(arguments["image"])
            say(removed=arguments["image"])
        elif verb == "images/pull":
            auth = [AuthConfig(username=arguments["username"], password=arguments["password"])] if arguments.get("username") else []

            layers: dict[str, tuple[int, int]] = {}

            def progress(digest: str, done: int, total: int) -> None:
                layers[digest] = (done, total)
                say(done=sum(part for part, _ in layers.values()), total=sum(whole for _, whole in layers.values()))

            image_id = await runtime.pull_image(arguments["image"], auth, progress=progress)
            say(pulled=arguments["image"], id=image_id)
        else:
            raise ValueError(f"unknown request {verb!r}")

    return answer


async def _refuse(verb: str, arguments: dict[str, Any], say: Say) -> None:
    raise ValueError("this node's runtime keeps its own images; use its tools, e.g. ctr -n k8s.io images import")
