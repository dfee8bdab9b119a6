"""The delivery benchmarks: servers, the load client, workloads, report."""
