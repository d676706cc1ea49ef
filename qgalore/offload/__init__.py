"""Host memory for what a layer needs on the device only while it runs: copied there and back beside the computation."""
