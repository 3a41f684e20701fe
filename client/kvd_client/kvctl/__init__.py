"""kvctl, the operator's command: what a daemon holds, and a few things to tell it. See main.py."""
