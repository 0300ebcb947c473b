"""The table: which functions check which kind. Importing it fills `registry.KINDS`."""

from __future__ import annotations

from knarr.api.validation import apps, batch, core, rbac, service
from knarr.api.validation.claims import create_claim, update_claim
from knarr.api.validation.pod import create_pod, create_pod_template, update_pod
from knarr.api.validation.registry import KINDS, Kind
from knarr.api.validation.strings import dns_1035_label, dns_label

KINDS.update(
    {
        ("", "pods"): Kind(create_pod, update_pod, rechecks_metadata=True),
        ("", "podtemplates"): Kind(create_pod_template),
        ("", "persistentvolumeclaims"): Kind(create_claim, update_claim, rechecks_metadata=True),
        ("", "persistentvolumes"): Kind(core.create_volume, core.update_volume, rechecks_metadata=True),
        ("", "configmaps"): Kind(core.create_config_map, core.update_config_map, rechecks_metadata=True),
        ("", "secrets"): Kind(core.create_secret, core.update_secret, rechecks_metadata=True),
        ("", "namespaces"): Kind(core.create_namespace, core.update_namespace, name=dns_label),
        ("", "nodes"): Kind(core.create_node, core.update_node),
        ("", "resourcequotas"): Kind(core.create_resource_quota, core.update_resource_quota),
        ("", "limitranges"): Kind(core.create_limit_range, rechecks_metadata=True),
        ("", "serviceaccounts"): Kind(rechecks_metadata=True),
        ("", "services"): Kind(service.create_service, service.update_service, name=dns_1035_label),
        ("", "endpoints"): Kind(service.create_endpoints),
        ("", "replicationcontrollers"): Kind(apps.create_replication_controller, apps.update_replication_controller),
        ("apps", "deployments"): Kind(apps.create_deployment, apps.update_deployment),
        ("apps", "replicasets"): Kind(apps.create_replica_set, apps.update_replica_set),
        ("apps", "statefulsets"): Kind(apps.create_stateful_set, apps.update_stateful_set, name=dns_label),
        ("apps", "daemonsets"): Kind(apps.create_daemon_set, apps.update_daemon_set),
        ("apps", "controllerrevisions"): Kind(apps.create_controller_revision, apps.update_controller_revision, rechecks_metadata=True),
        ("batch", "jobs"): Kind(batch.create_job, batch.update_job),
        ("batch", "cronjobs"): Kind(batch.create_cron_job, batch.update_cron_job),
        (rbac.GROUP, "roles"): Kind(rbac.create_role, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "clusterroles"): Kind(rbac.create_cluster_role, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "rolebindings"): Kind(rbac.create_role_binding, rbac.update_role_binding, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "clusterrolebindings"): Kind(
            rbac.create_cluster_role_binding, rbac.update_cluster_role_binding, name=rbac.rbac_name, rechecks_metadata=True
        ),
    }
)
