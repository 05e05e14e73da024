// Validates objects of Prometheus' operator and KEDA, given as a JSON list, against the schemas of their resources.
import { readFileSync } from "node:fs";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";

const kinds = { ...prometheus, ...keda };
for (const manifest of JSON.parse(readFileSync(0))) {
  new kinds[manifest.kind](manifest).validate();
  console.log(manifest.kind);
}
