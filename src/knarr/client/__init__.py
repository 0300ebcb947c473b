"""Kubeconfig, REST client, informers, work queue, events, leader election."""
