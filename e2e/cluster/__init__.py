"""A real Kubernetes of two nodes on one machine: each its own network, mounts, processes, containerd and kubelet."""
