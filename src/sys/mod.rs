//! The few system calls that std lacks. Nothing here knows what it is for.

pub mod file;
