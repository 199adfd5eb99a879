"""Faults on purpose: killed commands, full disks, damaged and replaced files."""
