"""The table: which functions check which kind. Importing it fills `registry.KINDS`."""

from __future__ import annotations

from knarr.api.validation import admissionregistration as admission
from knarr.api.validation import (
    apps,
    autoscaling,
    batch,
    certificates,
    core,
    definitions,
    devices,
    flowcontrol,
    migration,
    networking,
    policy,
    rbac,
    service,
    small,
    storage,
    trust,
)
from knarr.api.validation.claims import create_claim, update_claim
from knarr.api.validation.pod import create_pod, create_pod_template, update_pod
from knarr.api.validation.registry import KINDS, Kind
from knarr.api.validation.strings import dns_1035_label, dns_label, path_segment

KINDS.update(
    {
        ("", "pods"): Kind(create_pod, update_pod, rechecks_metadata=True),
        ("", "podtemplates"): Kind(create_pod_template),
        ("", "persistentvolumeclaims"): Kind(create_claim, update_claim, rechecks_metadata=True),
        ("", "persistentvolumes"): Kind(core.create_volume, core.update_volume, rechecks_metadata=True),
        ("", "configmaps"): Kind(core.create_config_map, core.update_config_map, rechecks_metadata=True),
        ("", "secrets"): Kind(core.create_secret, core.update_secret, rechecks_metadata=True),
        ("", "namespaces"): Kind(core.create_namespace, core.update_namespace, name=dns_label),
        ("", "nodes"): Kind(core.create_node, core.update_node, rechecks_metadata=True),
        ("", "resourcequotas"): Kind(core.create_resource_quota, core.update_resource_quota),
        ("", "limitranges"): Kind(core.create_limit_range, rechecks_metadata=True),
        ("", "serviceaccounts"): Kind(rechecks_metadata=True),
        ("", "services"): Kind(service.create_service, service.update_service, name=dns_1035_label),
        ("", "endpoints"): Kind(service.create_endpoints, rechecks_metadata=True),
        ("", "replicationcontrollers"): Kind(
            apps.create_replication_controller, apps.update_replication_controller, generate_name=False
        ),
        ("apps", "deployments"): Kind(apps.create_deployment, apps.update_deployment),
        ("apps", "replicasets"): Kind(apps.create_replica_set, apps.update_replica_set),
        ("apps", "statefulsets"): Kind(apps.create_stateful_set, apps.update_stateful_set, name=dns_label),
        ("apps", "daemonsets"): Kind(apps.create_daemon_set, apps.update_daemon_set),
        ("apps", "controllerrevisions"): Kind(apps.create_controller_revision, apps.update_controller_revision, rechecks_metadata=True),
        ("batch", "jobs"): Kind(batch.create_job, batch.update_job, rechecks_metadata=True),
        ("batch", "cronjobs"): Kind(batch.create_cron_job, batch.update_cron_job, status_core_finalizers=False),
        (rbac.GROUP, "roles"): Kind(rbac.create_role, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "clusterroles"): Kind(rbac.create_cluster_role, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "rolebindings"): Kind(rbac.create_role_binding, rbac.update_role_binding, name=rbac.rbac_name, rechecks_metadata=True),
        (rbac.GROUP, "clusterrolebindings"): Kind(
            rbac.create_cluster_role_binding, rbac.update_cluster_role_binding, name=rbac.rbac_name, rechecks_metadata=True
        ),
        ("autoscaling", "horizontalpodautoscalers"): Kind(autoscaling.create_autoscaler, autoscaling.update_autoscaler),
        ("networking.k8s.io", "ingresses"): Kind(networking.create_ingress, networking.update_ingress, rechecks_metadata=True),
        ("networking.k8s.io", "ingressclasses"): Kind(networking.create_ingress_class, networking.update_ingress_class, rechecks_metadata=True),
        ("networking.k8s.io", "networkpolicies"): Kind(networking.create_network_policy, rechecks_metadata=True),
        ("networking.k8s.io", "ipaddresses"): Kind(
            networking.create_ip_address, networking.update_ip_address, name=networking.ip_address_name, rechecks_metadata=True
        ),
        ("networking.k8s.io", "servicecidrs"): Kind(networking.create_service_cidr, networking.update_service_cidr),
        ("discovery.k8s.io", "endpointslices"): Kind(
            networking.create_endpoint_slice, networking.update_endpoint_slice, rechecks_metadata=True
        ),
        ("policy", "poddisruptionbudgets"): Kind(policy.create_budget, policy.update_budget, name=path_segment, core_finalizers=False),
        ("node.k8s.io", "runtimeclasses"): Kind(small.create_runtime_class, small.update_runtime_class, core_finalizers=False, rechecks_metadata=True),
        ("scheduling.k8s.io", "priorityclasses"): Kind(small.create_priority_class, small.update_priority_class),
        ("coordination.k8s.io", "leases"): Kind(small.create_lease, core_finalizers=False),
        ("certificates.k8s.io", "certificatesigningrequests"): Kind(
            certificates.create_request, certificates.update_request, name=certificates.any_name, rechecks_metadata=True
        ),
        ("certificates.k8s.io", "clustertrustbundles"): Kind(
            trust.create_bundle, trust.update_bundle, name=certificates.any_name, rechecks_metadata=True
        ),
        ("certificates.k8s.io", "podcertificaterequests"): Kind(trust.create_pod_request, trust.update_pod_request),
        ("apiregistration.k8s.io", "apiservices"): Kind(
            small.create_api_service, small.update_api_service, name=small.api_service_name, core_finalizers=False
        ),
        (admission.GROUP, "validatingwebhookconfigurations"): Kind(
            admission.create_validating, admission.update_validating, core_finalizers=False, rechecks_metadata=True,
        ),
        (admission.GROUP, "mutatingwebhookconfigurations"): Kind(
            admission.create_mutating, admission.update_mutating, core_finalizers=False, rechecks_metadata=True,
        ),
        (admission.GROUP, "validatingadmissionpolicies"): Kind(admission.create_policy, admission.update_policy, core_finalizers=False, rechecks_metadata=True),
        (admission.GROUP, "validatingadmissionpolicybindings"): Kind(admission.create_binding, core_finalizers=False, rechecks_metadata=True),
        ("apiextensions.k8s.io", "customresourcedefinitions"): Kind(
            definitions.create_definition, definitions.update_definition, core_finalizers=False
        ),
        ("flowcontrol.apiserver.k8s.io", "flowschemas"): Kind(
            flowcontrol.create_flow_schema, flowcontrol.update_flow_schema, rechecks_metadata=True
        ),
        ("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations"): Kind(
            flowcontrol.create_priority_level, flowcontrol.update_priority_level, rechecks_metadata=True
        ),
        ("resource.k8s.io", "resourceclaims"): Kind(devices.create_resource_claim, devices.update_resource_claim, rechecks_metadata=True),
        ("resource.k8s.io", "resourceclaimtemplates"): Kind(devices.create_claim_template, devices.update_claim_template, rechecks_metadata=True),
        ("resource.k8s.io", "deviceclasses"): Kind(devices.create_device_class, rechecks_metadata=True),
        ("resource.k8s.io", "devicetaintrules"): Kind(devices.create_taint_rule),
        ("resource.k8s.io", "resourceslices"): Kind(devices.create_resource_slice, devices.update_resource_slice),
        ("", "events"): Kind(small.create_core_event, small.update_core_event, name=path_segment, core_finalizers=False),
        ("events.k8s.io", "events"): Kind(small.create_event, small.update_event),
        ("storagemigration.k8s.io", "storageversionmigrations"): Kind(migration.create_migration, migration.update_migration, rechecks_metadata=True),
        ("storage.k8s.io", "storageclasses"): Kind(storage.create_storage_class, storage.update_storage_class, rechecks_metadata=True),
        ("storage.k8s.io", "volumeattributesclasses"): Kind(storage.create_attributes_class, storage.update_attributes_class, rechecks_metadata=True),
        ("storage.k8s.io", "volumeattachments"): Kind(storage.create_attachment, storage.update_attachment, rechecks_metadata=True),
        ("storage.k8s.io", "csidrivers"): Kind(storage.create_driver, storage.update_driver, name=storage.csi_driver_name),
        ("storage.k8s.io", "csinodes"): Kind(storage.create_csi_node, storage.update_csi_node, rechecks_metadata=True),
        ("storage.k8s.io", "csistoragecapacities"): Kind(storage.create_capacity, storage.update_capacity, rechecks_metadata=True),
    }
)
