"""Models of transformers: their structure, families, releases and devices."""
