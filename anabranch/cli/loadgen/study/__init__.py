"""`anabranch loadgen study`: a study file's clusters, one after another, in each way it names."""
