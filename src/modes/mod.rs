//! One file per subcommand: wiring only. Modes never name each other.
