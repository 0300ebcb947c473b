"""Names of all controllers, as upstream's and one of ours (local-path-provisioner-controller), and where each is made.

A value is "module:callable" below this package; the callable takes a Context. Modules are imported
only when their controller is enabled.
"""

from __future__ import annotations

CONTROLLERS: dict[str, str] = {
    "serviceaccount-token-controller": "serviceaccounttoken:ServiceAccountTokenController",
    "legacy-serviceaccount-token-cleaner-controller": "legacytokencleaner:LegacyTokenCleaner",
    "clusterrole-aggregation-controller": "clusterroleaggregation:ClusterRoleAggregationController",
    "certificatesigningrequest-approving-controller": "certificates:CSRApprovingController",
    "certificatesigningrequest-signing-controller": "certificates:CSRSigningController",
    "certificatesigningrequest-cleaner-controller": "certificates:CSRCleanerController",
    "bootstrap-signer-controller": "bootstrap:BootstrapSigner",
    "token-cleaner-controller": "bootstrap:TokenCleaner",
    "service-cidr-controller": "servicecidr:ServiceCIDRController",
    "validatingadmissionpolicy-status-controller": "admissionpolicystatus:ValidatingAdmissionPolicyStatusController",
    "persistentvolume-binder-controller": "volume.binder:PersistentVolumeBinder",
    "persistentvolume-attach-detach-controller": "volume.attachdetach:AttachDetachController",
    "local-path-provisioner-controller": "volume.localpath:LocalPathProvisioner",
    "persistentvolume-expander-controller": "volume.expander:VolumeExpander",
    "persistentvolumeclaim-protection-controller": "volume.protection:ClaimProtection",
    "persistentvolume-protection-controller": "volume.protection:VolumeProtection",
    "volumeattributesclass-protection-controller": "volume.protection:AttributesClassProtection",
    "resourceclaim-controller": "resourceclaim:ResourceClaimController",
    "ephemeral-volume-controller": "volume.ephemeral:EphemeralVolumeController",
    "endpoints-controller": "endpoints:EndpointsController",
    "endpointslice-controller": "endpointslice:EndpointSliceController",
    "endpointslice-mirroring-controller": "endpointslicemirroring:EndpointSliceMirroringController",
    "resourcequota-controller": "resourcequota:ResourceQuotaController",
    "disruption-controller": "disruption:DisruptionController",
    "ttl-after-finished-controller": "ttlafterfinished:TTLAfterFinishedController",
    "horizontal-pod-autoscaler-controller": "autoscaler.controller:HorizontalPodAutoscalerController",
    "ttl-controller": "ttl:TTLController",
    "replicationcontroller-controller": "replicaset:replication_controllers",
    "namespace-controller": "namespace:NamespaceController",
    "serviceaccount-controller": "serviceaccount:ServiceAccountController",
    "root-ca-certificate-publisher-controller": "serviceaccount:RootCAPublisher",
    "daemonset-controller": "daemonset.controller:DaemonSetController",
    "job-controller": "job.controller:JobController",
    "cronjob-controller": "cronjob.controller:CronJobController",
    "statefulset-controller": "statefulset.controller:StatefulSetController",
    "deployment-controller": "deployment.controller:DeploymentController",
    "replicaset-controller": "replicaset:ReplicaSetController",
    "pod-garbage-collector-controller": "podgc:PodGCController",
    "garbage-collector-controller": "garbagecollector.controller:GarbageCollector",
    "node-lifecycle-controller": "nodelifecycle:NodeLifecycleController",
    "taint-eviction-controller": "tainteviction:TaintEvictionController",
    "node-ipam-controller": "nodeipam:NodeIPAMController",
    "selinux-warning-controller": "volume.selinuxwarning:SELinuxWarningController",
    "device-taint-eviction-controller": "devicetainteviction:DeviceTaintEvictionController",
    "storage-version-migrator-controller": "storageversionmigrator:StorageVersionMigrator",
    "podcertificaterequest-cleaner-controller": "trust:PodCertificateRequestCleaner",
    "kube-apiserver-serving-clustertrustbundle-publisher-controller": "trust:ServingTrustPublisher",
}

GATES: dict[str, str] = {
    "device-taint-eviction-controller": "DRADeviceTaints",
    "storage-version-migrator-controller": "StorageVersionMigrator",
    "podcertificaterequest-cleaner-controller": "PodCertificateRequest",
    "kube-apiserver-serving-clustertrustbundle-publisher-controller": "ClusterTrustBundle",
}
"""Controllers that start only with a feature gate, which is off in 1.35."""

ALIASES: dict[str, str] = {
    "serviceaccount-token": "serviceaccount-token-controller",
    "endpoint": "endpoints-controller",
    "endpointslice": "endpointslice-controller",
    "endpointslicemirroring": "endpointslice-mirroring-controller",
    "replicationcontroller": "replicationcontroller-controller",
    "podgc": "pod-garbage-collector-controller",
    "resourcequota": "resourcequota-controller",
    "namespace": "namespace-controller",
    "serviceaccount": "serviceaccount-controller",
    "garbagecollector": "garbage-collector-controller",
    "daemonset": "daemonset-controller",
    "job": "job-controller",
    "deployment": "deployment-controller",
    "replicaset": "replicaset-controller",
    "horizontalpodautoscaling": "horizontal-pod-autoscaler-controller",
    "disruption": "disruption-controller",
    "statefulset": "statefulset-controller",
    "cronjob": "cronjob-controller",
    "csrsigning": "certificatesigningrequest-signing-controller",
    "csrapproving": "certificatesigningrequest-approving-controller",
    "csrcleaner": "certificatesigningrequest-cleaner-controller",
    "ttl": "ttl-controller",
    "bootstrapsigner": "bootstrap-signer-controller",
    "tokencleaner": "token-cleaner-controller",
    "nodeipam": "node-ipam-controller",
    "nodelifecycle": "node-lifecycle-controller",
    "persistentvolume-binder": "persistentvolume-binder-controller",
    "attachdetach": "persistentvolume-attach-detach-controller",
    "persistentvolume-expander": "persistentvolume-expander-controller",
    "clusterrole-aggregation": "clusterrole-aggregation-controller",
    "pvc-protection": "persistentvolumeclaim-protection-controller",
    "pv-protection": "persistentvolume-protection-controller",
    "ttl-after-finished": "ttl-after-finished-controller",
    "root-ca-cert-publisher": "root-ca-certificate-publisher-controller",
    "ephemeral-volume": "ephemeral-volume-controller",
    "storage-version-gc": "storageversion-garbage-collector-controller",
    "resource-claim-controller": "resourceclaim-controller",
    "cloud-node-lifecycle": "cloud-node-lifecycle-controller",
    "route": "node-route-controller",
    "service": "service-lb-controller",
    "svm": "storage-version-migrator-controller",
    "legacy-service-account-token-cleaner": "legacy-serviceaccount-token-cleaner-controller",
}

OFF_BY_DEFAULT = frozenset({"bootstrap-signer-controller", "token-cleaner-controller", "selinux-warning-controller"})

# Known to upstream's --controllers, so taken here too, and started by neither: its feature gate is off in 1.35 (the first),
# or they belong to a cloud provider (the others).
WITHOUT_WORK = frozenset(
    {
        "storageversion-garbage-collector-controller",
        "cloud-node-lifecycle-controller",
        "node-route-controller",
        "service-lb-controller",
    }
)
