"""`anabranch chaos`: processes are killed, frozen and cut off under load, and every token is compared."""
