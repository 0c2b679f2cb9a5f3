"""What runs in the cluster: SuperLink, coordinator, and the command line of the person who drives a study."""
