//! Serves /metrics, /healthz and /readyz.
