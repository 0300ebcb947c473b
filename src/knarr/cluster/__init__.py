"""Life of a cluster on this machine: up, down, status, PKI, kubeconfig, preflight, supervisor."""
