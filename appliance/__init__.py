"""What runs inside a hospital: supernode, link and worker under one supervisor."""
