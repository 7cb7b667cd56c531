"""What a driver needs around its stages: Ray, leases, progress, failures, jobs, MLflow."""
