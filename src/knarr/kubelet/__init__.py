"""The kubelet: runs the pods of one node. Entry point: kubelet.Kubelet. See the modules' own words; the README of the package
is docs/architecture.md."""
