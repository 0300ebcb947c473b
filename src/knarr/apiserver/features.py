"""Upstream's feature gates in 1.35, at their defaults, as the metric kubernetes_feature_enabled tells them.

Few can be switched here (SWITCHABLE): what a gate that is on by default brings is there, what another alpha gate would bring is not.

Source: pkg/features/kube_features.go, apiserver pkg/features, component-base metrics/prometheus/feature.
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.apiserver.metrics import family

_DEPRECATED_ON = """
AggregatedDiscoveryRemoveBetaType DisableNodeKubeProxyVersion KubeletPodResourcesListUseActivePods StorageNamespaceIndex
"""
_DEPRECATED_OFF = """
AllowDNSOnlyNodeCSR AllowInsecureKubeletCertificateSigningRequests AllowOverwriteTerminationGracePeriodSeconds AllowServiceLBStatusOnNonLB
GitRepoVolumeDriver InPlacePodVerticalScalingAllocatedStatus KMSv1 KubeletRegistrationGetOnExistsOnly SeparateCacheWatchRPC
WatchFromStorageWithoutResourceVersion WindowsHostNetwork
"""
_BETA_ON = """
APIResponseCompression APIServerIdentity AllowParsingUserUIDFromCertAuth CPUManagerPolicyBetaOptions ContainerCheckpoint ContextualLogging
DRAAdminAccess DRAPrioritizedList DRAResourceClaimDeviceStatus DRASchedulerFilterTimeout DeclarativeValidation DetectCacheInconsistency
DisableCPUQuotaWithExclusiveCPUs ExternalServiceAccountTokenSigner GracefulNodeShutdown GracefulNodeShutdownBasedOnPodPriority
ImageMaximumGCAge InOrderInformers InPlacePodVerticalScaling JobManagedBy KubeletFineGrainedAuthz KubeletPSI
KubeletPodResourcesDynamicResources KubeletPodResourcesGet KubeletSeparateDiskGC KubeletServiceAccountTokenForCredentialProviders
ListFromCacheSnapshot LoggingBetaOptions MatchLabelKeysInPodTopologySpread MatchLabelKeysInPodTopologySpreadSelectorMerge OpenAPIEnums
PodDeletionCost PodLevelResources PodObservedGenerationTracking PodReadyToStartContainersCondition PortForwardWebsockets
PreferSameTrafficDistribution PreventStaticPodAPIReferences ProcMountType ReloadKubeletServerCertificateFile RemoteRequestHeaderUID
RotateKubeletServerCertificate SELinuxChangePolicy SELinuxMountReadWriteOncePod SchedulerAsyncAPICalls SchedulerAsyncPreemption
SchedulerPopFromBackoffQ ServiceAccountNodeAudienceRestriction SizeBasedListCostEstimate StorageVersionHash
StructuredAuthenticationConfigurationEgressSelector SupplementalGroupsPolicy SystemdWatchdog TokenRequestServiceAccountUIDValidation
TopologyManagerPolicyBetaOptions TranslateStreamCloseWebsocketRequests UnauthenticatedHTTP2DOSMitigation UserNamespacesSupport WatchList
WindowsGracefulNodeShutdown
"""
_BETA_OFF = """
AllBeta ClusterTrustBundle ClusterTrustBundleProjection ConcurrentWatchObjectDecode CoordinatedLeaderElection DeclarativeValidationTakeover
ImageVolume LocalStorageCapacityIsolationFSQuotaMonitoring MutableCSINodeAllocatableCount MutatingAdmissionPolicy NodeLogQuery SELinuxMount
WatchCacheInitializationPostStartHook WatchListClient
"""
_ALPHA = """
APIServingWithRoutine AllAlpha AllowUnsafeMalformedObjectDeletion CBORServingAndStorage CPUManagerPolicyAlphaOptions CSIVolumeHealth
ClearingNominatedNodeNameAfterBinding ClientsAllowCBOR ClientsPreferCBOR CloudControllerManagerWebhook ComponentFlagz ComponentStatusz
ContainerRestartRules ContainerStopSignals CrossNamespaceVolumeDataSource CustomCPUCFSQuotaPeriod DRAConsumableCapacity
DRADeviceBindingConditions DRADeviceTaints DRAExtendedResource DRAPartitionableDevices DeploymentReplicaSetTerminatingReplicas EnvFiles
EventedPLEG HPAConfigurableTolerance HPAScaleToZero HostnameOverride InPlacePodVerticalScalingExclusiveCPUs
InPlacePodVerticalScalingExclusiveMemory InTreePluginPortworxUnregister InformerResourceVersion KubeletCrashLoopBackOffMax
KubeletEnsureSecretPulledImages KubeletInUserNamespace LoggingAlphaOptions MaxUnavailableStatefulSet MemoryQoS
NominatedNodeNameForExpectation PodAndContainerStatsFromCRI PodCertificateRequest PodLogsQuerySplitStreams PodTopologyLabelsAdmission
QOSReserved ReduceDefaultCrashLoopBackOffDecay RelaxedServiceNameValidation ResourceHealthStatus RuntimeClassInImageCriApi
StorageCapacityScoring StorageVersionAPI StorageVersionMigrator StrictIPCIDRValidation TopologyManagerPolicyAlphaOptions
UnknownVersionInteroperabilityProxy UserNamespacesPodSecurityStandards WindowsCPUAndMemoryAffinity
"""
_STABLE = """
APIServerTracing AnonymousAuthConfigurableEndpoints AnyVolumeDataSource AuthorizeNodeWithSelectors AuthorizeWithSelectors BtreeWatchCache
CPUManagerPolicyOptions CRDValidationRatcheting CSIMigrationPortworx ConsistentListFromCache CustomResourceFieldSelectors
DisableAllocatorDualWrite DynamicResourceAllocation ExecProbeTimeout HonorPVReclaimPolicy JobBackoffLimitPerIndex JobPodReplacementPolicy
JobSuccessPolicy KubeletCgroupDriverFromCRI KubeletTracing LoadBalancerIPMode LogarithmicScaleDown MatchLabelKeysInPodAffinity MemoryManager
MultiCIDRServiceAllocator NFTablesProxyMode NodeInclusionPolicyInPodTopologySpread NodeSwap OrderedNamespaceDeletion PodLifecycleSleepAction
PodLifecycleSleepActionAllowZero PodSchedulingReadiness RecoverVolumeExpansionFailure RecursiveReadOnlyMounts RelaxedDNSSearchValidation
RelaxedEnvironmentVariableValidation ResilientWatchCacheInitialization RetryGenerateName SchedulerQueueingHints
SeparateTaintEvictionController ServiceAccountTokenJTI ServiceAccountTokenNodeBinding ServiceAccountTokenNodeBindingValidation
ServiceAccountTokenPodNodeInfo ServiceTrafficDistribution SidecarContainers StreamingCollectionEncodingToJSON
StreamingCollectionEncodingToProtobuf StrictCostEnforcementForVAP StrictCostEnforcementForWebhooks StructuredAuthenticationConfiguration
StructuredAuthorizationConfiguration TopologyAwareHints TopologyManagerPolicyOptions VolumeAttributesClass WinDSR WinOverlay
"""
_GATES = (
    (_DEPRECATED_ON, "DEPRECATED", 1),
    (_DEPRECATED_OFF, "DEPRECATED", 0),
    (_BETA_ON, "BETA", 1),
    (_BETA_OFF, "BETA", 0),
    (_ALPHA, "ALPHA", 0),
    (_STABLE, "", 1),
)


SWITCHABLE = frozenset({"ClusterTrustBundle", "DRADeviceTaints", "MaxUnavailableStatefulSet", "PodCertificateRequest", "StorageVersionMigrator"})


def parse(text: str) -> dict[str, bool]:
    """Read "Name=true,Name=false"; gates left at their defaults are left out. Raises ValueError that says which gate cannot be so."""
    defaults = {name: bool(on) for names, _stage, on in _GATES for name in names.split()}
    out: dict[str, bool] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        name, _, value = part.partition("=")
        if value.lower() not in ("true", "false"):
            raise ValueError(f"missing bool value for {name}: NAME=true or NAME=false")
        if name not in defaults:
            raise ValueError(f"unrecognized feature gate: {name}")
        wanted = value.lower() == "true"
        if name not in SWITCHABLE and wanted != defaults[name]:
            raise ValueError(f"feature gate {name} cannot be switched here, it is {str(defaults[name]).lower()}; {', '.join(sorted(SWITCHABLE))} can")
        out[name] = wanted
    return {name: on for name, on in out.items() if on != defaults[name]}


def metrics(switched: Mapping[str, bool]) -> list[str]:
    """Return lines of the exposition format."""
    samples = sorted(
        (f'name="{name}",stage="{stage}"', int(switched.get(name, on))) for names, stage, on in _GATES for name in names.split()
    )  # fmt: skip
    return family(
        "kubernetes_feature_enabled", "gauge", "[BETA] This metric records the data about the stage and enablement of a k8s feature.", samples
    )
