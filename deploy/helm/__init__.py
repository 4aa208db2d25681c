"""The Helm chart's values, and the files generated from them; the chart itself is in `anabranch/`."""
