# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_imz_global_optspecs
    string join \n v/verbose h/help V/version
end

function __fish_imz_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_imz_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_imz_using_subcommand
    set -l cmd (__fish_imz_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c imz -n "__fish_imz_needs_command" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_needs_command" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_needs_command" -f -a "serve" -d 'Serve directories to clients'
complete -c imz -n "__fish_imz_needs_command" -f -a "mount" -d 'Mount a volume, or put a write-back cache before a directory'
complete -c imz -n "__fish_imz_needs_command" -f -a "umount" -d 'Ship what is pending, then unmount'
complete -c imz -n "__fish_imz_needs_command" -f -a "sync" -d 'Wait until all that was done in a mount is at the server'
complete -c imz -n "__fish_imz_needs_command" -f -a "status" -d 'Say how mounts are doing: connection, pending changes, cache'
complete -c imz -n "__fish_imz_needs_command" -f -a "pin" -d 'Keep files and directories whole in the cache'
complete -c imz -n "__fish_imz_needs_command" -f -a "unpin" -d 'Keep them no longer'
complete -c imz -n "__fish_imz_needs_command" -f -a "evict" -d 'Make room: give up data that the server has'
complete -c imz -n "__fish_imz_needs_command" -f -a "conflicts" -d 'Look at versions that lost, and decide about them'
complete -c imz -n "__fish_imz_needs_command" -f -a "kml" -d 'Look into journals (KML)'
complete -c imz -n "__fish_imz_needs_command" -f -a "inspect" -d 'Say all that imz knows of a file, a mount, a cache, a served directory or a journal'
complete -c imz -n "__fish_imz_needs_command" -f -a "fsck" -d 'Check a cache or a served directory, and repair it'
complete -c imz -n "__fish_imz_needs_command" -f -a "volume" -d 'Create, list, change, rename and remove the volumes of a running server'
complete -c imz -n "__fish_imz_needs_command" -f -a "replay" -d 'Apply a journal to a copy of a tree'
complete -c imz -n "__fish_imz_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand serve" -l listen -d 'The address and port to listen on' -r
complete -c imz -n "__fish_imz_using_subcommand serve" -l state -d 'Where imz keeps its own state of the volume: journal, index, lock' -r -F
complete -c imz -n "__fish_imz_using_subcommand serve" -l config -d 'Read what to serve, and how, from a file; see below' -r -F
complete -c imz -n "__fish_imz_using_subcommand serve" -l check-config -d 'Say every error in such a file, by its line, and serve nothing' -r -F
complete -c imz -n "__fish_imz_using_subcommand serve" -l keep-grant -d 'How long the room that a client was granted is kept for it while it is away' -r
complete -c imz -n "__fish_imz_using_subcommand serve" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand serve" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand mount" -s o -d 'Mount options, separated by commas; see below' -r
complete -c imz -n "__fish_imz_using_subcommand mount" -l cache -d 'Where the cache is: the files, and the journal of what is not yet at the server' -r -F
complete -c imz -n "__fish_imz_using_subcommand mount" -s f -l foreground -d 'Stay in the foreground, with messages on standard error'
complete -c imz -n "__fish_imz_using_subcommand mount" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand mount" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand mount" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand umount" -l timeout -d 'Give up if not all is shipped by then, and leave the mount as it is' -r
complete -c imz -n "__fish_imz_using_subcommand umount" -l now -d 'Do not wait for the server: the cache keeps what is pending, and its next mount ships it'
complete -c imz -n "__fish_imz_using_subcommand umount" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand umount" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand umount" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand sync" -l timeout -d 'Give up if not all is shipped by then' -r
complete -c imz -n "__fish_imz_using_subcommand sync" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand sync" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand sync" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand status" -l json -d 'One JSON object for a named mount, an array of them otherwise'
complete -c imz -n "__fish_imz_using_subcommand status" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand status" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand pin" -l priority -d 'What is fetched first: 0 to 100, higher ones before lower ones' -r
complete -c imz -n "__fish_imz_using_subcommand pin" -l no-wait -d 'Do not wait until all of it is here'
complete -c imz -n "__fish_imz_using_subcommand pin" -l list -d 'Show what is pinned, and whether it is all here'
complete -c imz -n "__fish_imz_using_subcommand pin" -l json -d 'The list as JSON'
complete -c imz -n "__fish_imz_using_subcommand pin" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand pin" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand pin" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand unpin" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand unpin" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand unpin" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand evict" -l all -d 'All that may go of a whole mount; what may not is counted, and no failure'
complete -c imz -n "__fish_imz_using_subcommand evict" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand evict" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand evict" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -f -a "list" -d 'One line for each conflict: ID, when, who, path, what, and why it did not fit'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -f -a "show" -d 'All that is known of a conflict: both versions, with their clients, times and stamps'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -f -a "diff" -d 'What the preserved version has that the tree\'s has not, and the other way round'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -f -a "resolve" -d 'Decide about a conflict'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and not __fish_seen_subcommand_from list show diff resolve help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from list" -l json -d 'An array with all that is known of each'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from list" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from list" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from show" -l json -d 'One JSON object'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from show" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from show" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from diff" -l json -d 'One JSON object'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from diff" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from diff" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from diff" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from resolve" -l stamp -d 'Only if the tree\'s version is still this one (list and show say which; 0: none)' -r
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from resolve" -l json -d 'One JSON object'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from resolve" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from resolve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from resolve" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from help" -f -a "list" -d 'One line for each conflict: ID, when, who, path, what, and why it did not fit'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from help" -f -a "show" -d 'All that is known of a conflict: both versions, with their clients, times and stamps'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from help" -f -a "diff" -d 'What the preserved version has that the tree\'s has not, and the other way round'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from help" -f -a "resolve" -d 'Decide about a conflict'
complete -c imz -n "__fish_imz_using_subcommand conflicts; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand kml; and not __fish_seen_subcommand_from dump help" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand kml; and not __fish_seen_subcommand_from dump help" -s h -l help -d 'Print help'
complete -c imz -n "__fish_imz_using_subcommand kml; and not __fish_seen_subcommand_from dump help" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand kml; and not __fish_seen_subcommand_from dump help" -f -a "dump" -d 'Print a journal, one line a record'
complete -c imz -n "__fish_imz_using_subcommand kml; and not __fish_seen_subcommand_from dump help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l from -d 'Start at a seq, or at a time like 2026-11-21T10:00:00Z (UTC)' -r
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l to -d 'End with a seq, or with a time' -r
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l path -d 'Only records of this path, or of what is below it' -r
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l json -d 'One JSON object a line'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l follow -d 'Go on with what is written from now on, until interrupted'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -l reverse -d 'Newest first'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from dump" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from help" -f -a "dump" -d 'Print a journal, one line a record'
complete -c imz -n "__fish_imz_using_subcommand kml; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand inspect" -l json -d 'One JSON object'
complete -c imz -n "__fish_imz_using_subcommand inspect" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand inspect" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand inspect" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand fsck" -l state -d 'Where imz serve keeps the state of this directory, if not in it' -r -F
complete -c imz -n "__fish_imz_using_subcommand fsck" -l repair -d 'Put right what can be put right'
complete -c imz -n "__fish_imz_using_subcommand fsck" -l json -d 'One JSON object a line'
complete -c imz -n "__fish_imz_using_subcommand fsck" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand fsck" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand fsck" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "create" -d 'Serve one more directory as a volume, at once'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "list" -d 'List a server\'s volumes: what they hold, and for whom'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "set" -d 'Change a volume\'s limits, or whether it may be changed'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "rename" -d 'Give a volume another name; its clients go on'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "remove" -d 'Serve a volume no more; its files stay where they are'
complete -c imz -n "__fish_imz_using_subcommand volume; and not __fish_seen_subcommand_from create list set rename remove help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -l quota -d 'How much its files may hold in all: 200M, 1T; none for no limit but the disk' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -l quota-files -d 'How many files, directories and links it may have in all; none for no limit' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -l user-quota -d 'How much the files of one user may hold, by user id; may be given again and again' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -l read-only -d 'Clients may read it, and not change it'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from create" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -l users -d 'The limits of users as well'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -l json -d 'An array of JSON objects'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from list" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l quota -d 'How much its files may hold in all: 200M, 1T; none for no limit but the disk' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l quota-files -d 'How many files, directories and links it may have in all; none for no limit' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l user-quota -d 'How much the files of one user may hold, by user id; may be given again and again' -r
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l mode -d 'Whether clients may change it' -r -f -a "rw\t'read and write'
ro\t'read only'"
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -l force -d 'Although clients have changes that are not here, or a limit is below what is taken'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from set" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from rename" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from rename" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from rename" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from rename" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from remove" -l server -d 'Which server: its process id, a directory that it serves, or its control socket' -r -F
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from remove" -l force -d 'Although clients use it'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from remove" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from remove" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "create" -d 'Serve one more directory as a volume, at once'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "list" -d 'List a server\'s volumes: what they hold, and for whom'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "set" -d 'Change a volume\'s limits, or whether it may be changed'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "rename" -d 'Give a volume another name; its clients go on'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "remove" -d 'Serve a volume no more; its files stay where they are'
complete -c imz -n "__fish_imz_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand replay" -l onto -d 'The copy that the journal is applied to' -r -F
complete -c imz -n "__fish_imz_using_subcommand replay" -l from -d 'Pass over the records before this one' -r
complete -c imz -n "__fish_imz_using_subcommand replay" -l until -d 'End with a seq, or before the first record that is later than a time' -r
complete -c imz -n "__fish_imz_using_subcommand replay" -l data -d 'Take the contents of files from this directory' -r -F
complete -c imz -n "__fish_imz_using_subcommand replay" -l undo -d 'Take the changes back, from the newest to the one that --from names'
complete -c imz -n "__fish_imz_using_subcommand replay" -l dry-run -d 'Change nothing: print what would be done, one line a record'
complete -c imz -n "__fish_imz_using_subcommand replay" -l json -d 'One JSON object a line, and one with the sums at the end'
complete -c imz -n "__fish_imz_using_subcommand replay" -s v -l verbose -d 'Say more on standard error; twice for debugging, three times for a trace'
complete -c imz -n "__fish_imz_using_subcommand replay" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c imz -n "__fish_imz_using_subcommand replay" -s V -l version -d 'Print version'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "serve" -d 'Serve directories to clients'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "mount" -d 'Mount a volume, or put a write-back cache before a directory'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "umount" -d 'Ship what is pending, then unmount'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "sync" -d 'Wait until all that was done in a mount is at the server'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "status" -d 'Say how mounts are doing: connection, pending changes, cache'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "pin" -d 'Keep files and directories whole in the cache'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "unpin" -d 'Keep them no longer'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "evict" -d 'Make room: give up data that the server has'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "conflicts" -d 'Look at versions that lost, and decide about them'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "kml" -d 'Look into journals (KML)'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "inspect" -d 'Say all that imz knows of a file, a mount, a cache, a served directory or a journal'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "fsck" -d 'Check a cache or a served directory, and repair it'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "volume" -d 'Create, list, change, rename and remove the volumes of a running server'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "replay" -d 'Apply a journal to a copy of a tree'
complete -c imz -n "__fish_imz_using_subcommand help; and not __fish_seen_subcommand_from serve mount umount sync status pin unpin evict conflicts kml inspect fsck volume replay help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from conflicts" -f -a "list" -d 'One line for each conflict: ID, when, who, path, what, and why it did not fit'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from conflicts" -f -a "show" -d 'All that is known of a conflict: both versions, with their clients, times and stamps'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from conflicts" -f -a "diff" -d 'What the preserved version has that the tree\'s has not, and the other way round'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from conflicts" -f -a "resolve" -d 'Decide about a conflict'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from kml" -f -a "dump" -d 'Print a journal, one line a record'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "create" -d 'Serve one more directory as a volume, at once'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "list" -d 'List a server\'s volumes: what they hold, and for whom'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "set" -d 'Change a volume\'s limits, or whether it may be changed'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "rename" -d 'Give a volume another name; its clients go on'
complete -c imz -n "__fish_imz_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "remove" -d 'Serve a volume no more; its files stay where they are'
