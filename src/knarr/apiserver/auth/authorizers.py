"""The chain of authorizers: system:masters, then the configured modes in order; the first that decides wins.

Source: apiserver pkg/authorization/union, authorizerfactory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from knarr.apiserver.attributes import Attributes, Decision
from knarr.apiserver.auth import users


class SyncAuthorizer(Protocol):
    """Decides from memory."""

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]: ...


class AsyncAuthorizer(SyncAuthorizer, Protocol):
    """Decides over the network: authorize answers ASK unless it remembers."""

    async def authorize_async(self, attributes: Attributes) -> tuple[Decision, str]: ...


class AlwaysAllow:
    """Mode AlwaysAllow."""

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        return Decision.ALLOW, ""


class AlwaysDeny:
    """Mode AlwaysDeny."""

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        return Decision.NO_OPINION, "Everything is forbidden."


class UnionAuthorizer:
    """Asks each authorizer in turn; reasons of those without opinion are collected."""

    def __init__(self, authorizers: Sequence[SyncAuthorizer | AsyncAuthorizer]) -> None:
        self._authorizers = tuple(authorizers)

    def replace(self, authorizers: Sequence[SyncAuthorizer | AsyncAuthorizer]) -> None:
        """Ask these from now on."""
        self._authorizers = tuple(authorizers)

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        if users.MASTERS in attributes.user.groups:
            return Decision.ALLOW, ""
        reasons: list[str] = []
        for authorizer in self._authorizers:
            decision, reason = authorizer.authorize(attributes)
            if decision is not Decision.NO_OPINION:
                return decision, reason
            if reason:
                reasons.append(reason)
        return Decision.NO_OPINION, "\n".join(reasons)

    async def authorize_async(self, attributes: Attributes) -> tuple[Decision, str]:
        if users.MASTERS in attributes.user.groups:
            return Decision.ALLOW, ""
        reasons: list[str] = []
        for authorizer in self._authorizers:
            decision, reason = authorizer.authorize(attributes)
            if decision is Decision.ASK:
                ask = getattr(authorizer, "authorize_async")  # noqa: B009  only an AsyncAuthorizer answers ASK
                decision, reason = await ask(attributes)
            if decision is not Decision.NO_OPINION:
                return decision, reason
            if reason:
                reasons.append(reason)
        return Decision.NO_OPINION, "\n".join(reasons)

    async def decide(self, attributes: Attributes) -> tuple[Decision, str]:
        """Decide with waiting where need be."""
        decision, reason = self.authorize(attributes)
        if decision is Decision.ASK:
            return await self.authorize_async(attributes)
        return decision, reason
