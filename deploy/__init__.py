"""Clotline as a guarded, watched service: the gateway, monitoring, and how they are started and stopped."""
