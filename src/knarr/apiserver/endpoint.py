"""A served resource: what a path such as /apis/apps/v1/…/deployments leads to.

Made by the registry (built-in kinds) and by the CRD controller (custom ones); looked up by the pipeline. Several endpoints
may share one store: events in two groups, two versions of a CRD. It holds the forms, so that every request for the same
Accept header gets the same form object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from knarr.api import errors
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver import negotiation
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.forms import ConvertedForm, Converter, Form, PartialForm, RowFunction, TableForm, item_of
from knarr.apiserver.negotiation import JSON, PROTOBUF, YAML
from knarr.apiserver.registry.base import Strategy
from knarr.apiserver.store import ResourceStore
from knarr.apiserver.watching import VIEW

_GO_FOLDERS = {
    ("", "replicationcontrollers"): "controllers", ("", "endpoints"): "services/endpoints", ("", "nodes"): "minions",
    ("", "services"): "services/specs", ("networking.k8s.io", "ingresses"): "ingress",
}  # fmt: skip

if TYPE_CHECKING:
    from knarr.apiserver.crd.webhook import WebhookConverter

TableFactory = Callable[[Resource], tuple[list[Object], RowFunction]]


class Endpoint:
    """See the module's docstring.

    Args:
      store: None for resources that are answered, not stored (reviews, bindings).
      from_stored, to_stored: Conversion when this version is not the stored one.
    """

    def __init__(
        self, resource: Resource, store: ResourceStore | None, strategy: Strategy, *, from_stored: Converter | None = None,
        to_stored: Converter | None = None, table: TableFactory | None = None, protobuf: bool = True,
        schema: Any = None,
    ) -> None:  # fmt: skip
        self.resource = resource
        self.store = store
        self.strategy = strategy
        self.from_stored = from_stored
        self.to_stored = to_stored
        self.json: Form = Form(resource)
        if from_stored is not None and store is not None:
            self.json = ConvertedForm(resource, from_stored, store.cache.head)
        self._table = table
        self._protobuf = protobuf
        self._forms: dict[tuple[object, ...], Form] = {("json",): self.json}
        self._by_accept: dict[tuple[str, str, bool], tuple[Form, bool, bool]] = {}
        self.schema = schema
        """Compiled functions of a custom resource's schema (prune, default, validate); None for built-in kinds."""
        self.converter: WebhookConverter | None = None
        """Converts between versions when that needs waiting (custom resources with a conversion webhook)."""
        self.claims_on_create = type(strategy).begin_create is not Strategy.begin_create
        self.claims_on_update = type(strategy).begin_update is not Strategy.begin_update
        """Whether the kind claims something (addresses, ports): most do not, and are not asked."""
        self.warnings: tuple[str, ...] = ()
        """Sent with every answer (deprecated versions)."""

    @property
    def go_key(self) -> str:
        """Where upstream keeps the objects in etcd, which its messages tell; ends with a slash."""
        resource = self.resource
        if resource.custom or resource.group in ("apiextensions.k8s.io", "apiregistration.k8s.io"):
            return f"/registry/{resource.group}/{resource.plural}/"
        return f"/registry/{_GO_FOLDERS.get((resource.group, resource.plural), resource.plural)}/"

    @property
    def stored_as_is(self) -> bool:
        """Whether objects of this version are stored without conversion."""
        return self.to_stored is None and self.converter is None

    def form_of_written(self, obj: Object, stored: Object) -> object:
        """Return the id of the form that an object just written here is in without further ado, None when there is no such form.

        What a client wrote has been pruned and defaulted by the schema that would be applied to it again when it is read.
        """
        schema = self.schema
        return self.json.id if schema is not None and stored is obj and self.converter is None and schema.settled else None

    @property
    def live_store(self) -> ResourceStore:
        if self.store is None:
            raise errors.method_not_supported(self.resource, "get")
        return self.store

    # -- versions that need waiting --------------------------------------------------------------------------------------------
    def unprepared(self, objects: Sequence[CachedObject]) -> list[CachedObject]:
        """Return those objects that cannot be shown in this version without asking the webhook first."""
        if self.converter is None:
            return []
        mine, form_id = self.resource.api_version, self.json.id
        return [cached for cached in objects if cached.version != mine and (cached.forms is None or form_id not in cached.forms)]

    async def prepare(self, objects: Sequence[CachedObject]) -> None:
        """Convert what cannot be shown otherwise. Raises StatusError."""
        waiting = self.unprepared(objects)
        if not waiting or self.converter is None:
            return
        cache = self.live_store.cache
        converted = await self.converter.convert([cache.private(cached) for cached in waiting], self.resource.api_version)
        for cached, obj in zip(waiting, converted, strict=True):
            if self.from_stored is not None:
                obj = self.from_stored(obj)
            if cached.forms is None:
                cached.forms = {}
            obj["metadata"]["resourceVersion"] = str(cached.revision)
            cached.forms[self.json.id] = item_of(obj)
            cached.forms[VIEW, self.resource.api_version] = cache.view_of(obj)

    async def load(self, cached: CachedObject) -> Object:
        """Return a private copy of a stored object in this version."""
        obj = self.live_store.cache.private(cached)
        if self.converter is not None:
            obj = (await self.converter.convert([obj], self.resource.api_version))[0]
        return self.from_stored(obj) if self.from_stored is not None else obj

    async def dump(self, obj: Object) -> Object:
        """Return an object of this version in the stored one."""
        if self.converter is not None:
            return (await self.converter.convert([obj], self.live_store.resource.api_version))[0]
        return self.to_stored(obj) if self.to_stored is not None else obj

    def form_for(self, accept: str, includes: str = "", *, many: bool = False, watch: bool = False) -> tuple[Form, bool, bool]:
        """Choose the form for an Accept header.

        Args:
          includes: The includeObject parameter (Tables).
          many: The answer is a list (PartialObjectMetadataList may be asked for).

        Returns:
          (form, as YAML, pretty)

        Raises:
          StatusError: 406.
        """
        key = (accept, includes, many or watch)
        found = self._by_accept.get(key)
        if found is None:
            found = self._choose(accept, includes, many=many, watch=watch)
            if len(self._by_accept) < 64:
                self._by_accept[key] = found
        return found

    def _choose(self, accept: str, includes: str, *, many: bool, watch: bool) -> tuple[Form, bool, bool]:
        clauses = negotiation.parse_accept(accept)
        if not clauses and not self.resource.custom:
            watched = (f"{JSON};stream=watch", f"{PROTOBUF};stream=watch") if many or watch else ()
            raise errors.rejected_by_router(406, (*negotiation.SUPPORTED, *watched))
        for clause in clauses:
            if clause.media_type == PROTOBUF and ((self.resource.custom and not clause.as_kind) or not self._protobuf):
                continue
            if clause.media_type == YAML and watch:
                continue
            kind = clause.as_kind
            if not kind and not clause.as_group and not clause.as_version:
                form = self.protobuf_form() if clause.media_type == PROTOBUF else self.json
                return form, clause.media_type == YAML, clause.pretty
            if clause.as_group != "meta.k8s.io" or clause.as_version not in ("v1", "v1beta1"):
                continue
            if kind == "Table" and clause.media_type != PROTOBUF and self._table is not None:
                return self.table_form(clause.as_version, includes or "Metadata"), clause.media_type == YAML, clause.pretty
            wanted = "PartialObjectMetadataList" if many and not watch else "PartialObjectMetadata"
            if kind == wanted:
                form = self.partial_form(clause.as_version, clause.media_type == PROTOBUF)
                return form, clause.media_type == YAML, clause.pretty
            if kind in ("PartialObjectMetadata", "PartialObjectMetadataList"):
                raise errors.not_that_shape(kind, many, self._go_type(many))
        raise errors.not_acceptable(self.media_types(watch))

    def _go_type(self, many: bool) -> str:
        """Return the type that upstream names in its answers."""
        if self.resource.custom:
            return "unstructured.UnstructuredList" if many else "unstructured.Unstructured"
        group = "core" if self.resource.group in ("", "events.k8s.io") else self.resource.group.partition(".")[0]
        return f"{group}.{self.resource.kind}{'List' if many else ''}"

    def media_types(self, watch: bool = False) -> list[str]:
        types = [f"{JSON};stream=watch" if self._protobuf and not self.resource.custom else JSON] if watch else [JSON, YAML]
        if not self.resource.custom and self._protobuf:
            types.append(f"{PROTOBUF};stream=watch" if watch else PROTOBUF)
        return types

    def table_form(self, version: str, includes: str) -> Form:
        key = ("table", version, includes)
        form = self._forms.get(key)
        if form is None:
            assert self._table is not None
            columns, row = self._table(self.resource)
            form = self._forms[key] = TableForm(self.resource, version, columns, row, includes, self.json)
        return form

    def partial_form(self, version: str, protobuf: bool) -> Form:
        key = ("partial", version, protobuf)
        form = self._forms.get(key)
        if form is None:
            if protobuf:
                from knarr.apiserver.protoforms import ProtobufPartialForm

                form = ProtobufPartialForm(self.resource, version)
            else:
                form = PartialForm(self.resource, version)
            self._forms[key] = form
        return form

    def protobuf_form(self) -> Form:
        form = self._forms.get(("protobuf",))
        if form is None:
            from knarr.apiserver.protoforms import ProtobufForm

            form = self._forms[("protobuf",)] = ProtobufForm(self.resource, self.json)
        return form
