// Package crds names the kinds of Prometheus' operator, whose definitions are generated from their Go types
// for the cluster of the end-to-end tests.
package crds

import (
	_ "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
)
